//! The storage servers near this node: its own, then those of its zone. Volumes are read there first.
//!
//! Looked up at the start and then rarely: a driver takes the order when it opens, and nothing but speed depends on it.

use kube::api::{Api, ListParams};
use kube::{Client, ResourceExt};
use lamina_crds::StorageServer;
use lamina_protocol::ids::ServerId;
use std::time::Duration;
use tokio::sync::watch;

/// Between two looks.
const LOOK: Duration = Duration::from_secs(300);
/// After a look that failed.
const AGAIN: Duration = Duration::from_secs(10);
/// Servers of a zone that are asked for; more are as far as any.
const MOST: u32 = 64;

/// Keeps the list until nobody holds the receiver.
pub(crate) fn follow(client: Client, node: &str) -> watch::Receiver<Vec<ServerId>> {
    let (newest, near) = watch::channel(Vec::new());
    let (servers, node) = (Api::<StorageServer>::all(client), node.to_owned());
    tokio::spawn(async move {
        while !newest.is_closed() {
            let pause = match look(&servers, &node).await {
                Ok(found) => {
                    newest.send_replace(found);
                    LOOK
                }
                Err(why) => {
                    tracing::warn!(%why, "the storage servers near this node are not known");
                    AGAIN
                }
            };
            // sleep: the next look; servers seldom move.
            tokio::time::sleep(pause).await;
        }
    });
    near
}

async fn look(servers: &Api<StorageServer>, node: &str) -> Result<Vec<ServerId>, kube::Error> {
    let Some(own) = servers.get_opt(node).await? else { return Ok(Vec::new()) };
    let Some(zone) = own.spec.zone.clone().filter(|zone| !zone.is_empty()) else { return Ok(order(&own, &[])) };
    let params = ListParams::default().fields(&format!("spec.zone={zone}")).limit(MOST);
    Ok(order(&own, &servers.list(&params).await?.items))
}

/// The node's own server first, then the others of its zone.
fn order(own: &StorageServer, zone: &[StorageServer]) -> Vec<ServerId> {
    let others = zone.iter().filter(|server| server.name_any() != own.name_any());
    let id = |server: &StorageServer| server.status.as_ref()?.server_id.as_ref()?.value().map(ServerId);
    std::iter::once(own).chain(others).filter_map(id).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_nodes_own_server_is_nearest_and_one_without_an_id_is_left_out() {
        let server = |name: &str, id: Option<u128>| -> StorageServer {
            let status = id.map(|id| serde_json::json!({"serverId": ServerId(id).to_string()}));
            let object = serde_json::json!({
                "apiVersion": "lamina.dev/v1alpha1", "kind": "StorageServer", "metadata": {"name": name},
                "spec": {"zone": "z"}, "status": status,
            });
            serde_json::from_value(object).unwrap()
        };
        let own = server("n2", Some(2));
        let zone = [server("n1", Some(1)), own.clone(), server("n3", None), server("n4", Some(4))];
        assert_eq!(order(&own, &zone), [ServerId(2), ServerId(1), ServerId(4)]);
        assert_eq!(order(&server("n9", None), &zone[..1]), [ServerId(1)]);
    }
}
