//! The Identity service: the same on the controller's and on the node's socket.
//!
//! Invariant: Probe says what the program itself says about itself, through one watch that it shares with its other health
//! answers; it asks nobody else, so it answers at once.

use tokio::sync::watch;
use tonic::{Request, Response, Status};

use crate::v1;
use crate::v1::identity_server::{Identity, IdentityServer};
use crate::v1::plugin_capability::{Service, VolumeExpansion, service, volume_expansion};
use crate::{DRIVER_NAME, VERSION};

/// How far the program is.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub enum Readiness {
    /// It starts; callers wait.
    #[default]
    NotYet,
    /// It serves.
    Ready,
    /// It will never serve as things stand; callers see FAILED_PRECONDITION and the reason.
    Impossible {
        /// For people, without secrets.
        reason: String,
    },
}

/// Identity of `csi.lamina.dev`.
#[derive(Clone, Debug)]
pub struct IdentityService {
    readiness: watch::Receiver<Readiness>,
}

impl IdentityService {
    /// Answers Probe by this watch; the sender may be gone, the last value then stands.
    #[must_use]
    pub fn new(readiness: watch::Receiver<Readiness>) -> Self {
        Self { readiness }
    }

    /// For a tonic router.
    #[must_use]
    pub fn into_server(self) -> IdentityServer<Self> {
        IdentityServer::new(self)
    }
}

#[tonic::async_trait]
impl Identity for IdentityService {
    async fn get_plugin_info(
        &self,
        _request: Request<v1::GetPluginInfoRequest>,
    ) -> Result<Response<v1::GetPluginInfoResponse>, Status> {
        let (name, vendor_version) = (DRIVER_NAME.to_owned(), VERSION.to_owned());
        Ok(Response::new(v1::GetPluginInfoResponse { name, vendor_version, manifest: Default::default() }))
    }

    async fn get_plugin_capabilities(
        &self,
        _request: Request<v1::GetPluginCapabilitiesRequest>,
    ) -> Result<Response<v1::GetPluginCapabilitiesResponse>, Status> {
        Ok(Response::new(v1::GetPluginCapabilitiesResponse { capabilities: capabilities() }))
    }

    async fn probe(&self, _request: Request<v1::ProbeRequest>) -> Result<Response<v1::ProbeResponse>, Status> {
        let ready = match &*self.readiness.borrow() {
            Readiness::NotYet => false,
            Readiness::Ready => true,
            Readiness::Impossible { reason } => return Err(Status::failed_precondition(reason.clone())),
        };
        Ok(Response::new(v1::ProbeResponse { ready: Some(ready) }))
    }
}

fn capabilities() -> Vec<v1::PluginCapability> {
    use v1::plugin_capability::Type;
    let service = |kind: service::Type| Type::Service(Service { r#type: kind.into() });
    let expansion = |kind: volume_expansion::Type| Type::VolumeExpansion(VolumeExpansion { r#type: kind.into() });
    [
        service(service::Type::ControllerService),
        service(service::Type::VolumeAccessibilityConstraints),
        expansion(volume_expansion::Type::Online),
    ]
    .map(|kind| v1::PluginCapability { r#type: Some(kind) })
    .into()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use tonic::Code;

    #[tokio::test]
    async fn probe_follows_the_program() {
        let (program, readiness) = watch::channel(Readiness::NotYet);
        let identity = IdentityService::new(readiness);
        let probe = || async { identity.probe(Request::new(v1::ProbeRequest {})).await };
        assert_eq!(probe().await.unwrap().get_ref().ready, Some(false));
        program.send_replace(Readiness::Ready);
        assert_eq!(probe().await.unwrap().get_ref().ready, Some(true));
        program.send_replace(Readiness::Impossible { reason: "no /dev/fuse".to_owned() });
        let refused = probe().await.unwrap_err();
        assert_eq!((refused.code(), refused.message()), (Code::FailedPrecondition, "no /dev/fuse"));
        drop(program);
        assert!(probe().await.is_err());
    }

    #[tokio::test]
    async fn the_plugin_has_a_name_that_csi_allows_and_a_version() {
        let identity = IdentityService::new(watch::channel(Readiness::Ready).1);
        let answer = identity.get_plugin_info(Request::new(v1::GetPluginInfoRequest {})).await.unwrap();
        let answer = answer.get_ref();
        assert_eq!(answer.name, "csi.lamina.dev");
        assert!(answer.name.len() <= 63 && !answer.vendor_version.is_empty());
    }

    #[test]
    fn controller_topology_and_online_growth_are_announced() {
        let all = capabilities();
        assert_eq!(all.len(), 3);
        let text = format!("{all:?}");
        for announced in ["ControllerService", "VolumeAccessibilityConstraints", "Online"] {
            assert!(text.contains(announced), "{text}");
        }
    }
}
