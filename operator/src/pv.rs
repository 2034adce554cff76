//! Which PersistentVolume names a volume: for messages, nothing is decided by it.

use k8s_openapi::api::core::v1::PersistentVolume;
use kube::api::{Api, ListParams};
use kube::{Client, ResourceExt};
use lamina_csi_api::DRIVER_NAME;
use lamina_protocol::ids::VolumeId;

/// A message about a volume, with the PersistentVolume that names it. Costs one list of PersistentVolumes; where that
/// fails the message goes without.
pub(crate) async fn named(client: &Client, volume: VolumeId, text: &str) -> String {
    let listed = Api::<PersistentVolume>::all(client.clone()).list(&ListParams::default()).await;
    match listed {
        Ok(listed) => with_name(listed.items.iter().find(|pv| is_of(pv, volume)), text),
        Err(error) => {
            tracing::warn!(%volume, %error, "the PersistentVolume of a volume could not be looked up");
            text.to_owned()
        }
    }
}

fn is_of(pv: &PersistentVolume, volume: VolumeId) -> bool {
    let csi = pv.spec.as_ref().and_then(|spec| spec.csi.as_ref()).filter(|csi| csi.driver == DRIVER_NAME);
    csi.is_some_and(|csi| csi.volume_handle.parse() == Ok(volume))
}

fn with_name(pv: Option<&PersistentVolume>, text: &str) -> String {
    let Some(pv) = pv else { return format!("{text} (no PersistentVolume names it)") };
    let claim = pv.spec.as_ref().and_then(|spec| spec.claim_ref.as_ref());
    let claim = claim.and_then(|claim| Some(format!(", claim {}/{}", claim.namespace.as_ref()?, claim.name.as_ref()?)));
    format!("PersistentVolume {}{}: {text}", pv.name_any(), claim.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::json;

    #[test]
    fn a_message_names_the_persistent_volume_of_this_driver_and_handle_only() {
        let pv = |driver: &str, handle: u128| -> PersistentVolume {
            let csi = json!({"driver": driver, "volumeHandle": format!("{handle:032x}")});
            let claim = json!({"namespace": "default", "name": "data"});
            serde_json::from_value(json!({"metadata": {"name": "pvc-1"}, "spec": {"csi": csi, "claimRef": claim}}))
                .unwrap()
        };
        assert!(is_of(&pv(DRIVER_NAME, 7), VolumeId(7)));
        assert!(!is_of(&pv("other.example", 7), VolumeId(7)) && !is_of(&pv(DRIVER_NAME, 8), VolumeId(7)));
        let text = with_name(Some(&pv(DRIVER_NAME, 7)), "volume v is in use on node n1");
        assert_eq!(text, "PersistentVolume pvc-1, claim default/data: volume v is in use on node n1");
    }
}
