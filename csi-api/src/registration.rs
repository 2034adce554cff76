//! The node's half makes itself known to the kubelet, without node-driver-registrar: the kubelet finds the socket in its
//! `plugins_registry` directory, asks what it is, and says whether it took it.
//!
//! Invariant: the last word of the kubelet is in the watch; who serves this decides what a refusal means (node-driver-registrar
//! exits, so that a new socket makes the kubelet try again). The socket's name must not begin with a dot: the kubelet would
//! not look at it.

use tokio::sync::watch;
use tonic::{Request, Response, Status};

use crate::DRIVER_NAME;
use crate::pluginregistration as wire;
use crate::pluginregistration::registration_server::{Registration, RegistrationServer};

/// What the kubelet calls this kind of plugin.
const PLUGIN_TYPE: &str = "CSIPlugin";

/// Versions of CSI that are served; the kubelet takes any 1.x and keeps the highest.
const SUPPORTED_VERSIONS: [&str; 2] = ["1.0.0", "1.12.0"];

/// What the kubelet said last.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub enum RegistrationOutcome {
    /// Nothing yet.
    #[default]
    Waiting,
    /// It took the plugin.
    Registered,
    /// It did not.
    Refused {
        /// Why, in its words.
        error: String,
    },
}

/// Registration of `csi.lamina.dev`.
#[derive(Debug)]
pub struct RegistrationService {
    endpoint: String,
    outcome: watch::Sender<RegistrationOutcome>,
}

impl RegistrationService {
    /// `endpoint` is the path of the CSI socket as the kubelet, not this container, sees it.
    #[must_use]
    pub fn new(endpoint: impl Into<String>, outcome: watch::Sender<RegistrationOutcome>) -> Self {
        Self { endpoint: endpoint.into(), outcome }
    }

    /// For a tonic router.
    #[must_use]
    pub fn into_server(self) -> RegistrationServer<Self> {
        RegistrationServer::new(self)
    }
}

#[tonic::async_trait]
impl Registration for RegistrationService {
    async fn get_info(&self, _request: Request<wire::InfoRequest>) -> Result<Response<wire::PluginInfo>, Status> {
        Ok(Response::new(wire::PluginInfo {
            r#type: PLUGIN_TYPE.to_owned(),
            name: DRIVER_NAME.to_owned(),
            endpoint: self.endpoint.clone(),
            supported_versions: SUPPORTED_VERSIONS.map(str::to_owned).into(),
        }))
    }

    async fn notify_registration_status(
        &self,
        request: Request<wire::RegistrationStatus>,
    ) -> Result<Response<wire::RegistrationStatusResponse>, Status> {
        let wire::RegistrationStatus { plugin_registered, error } = request.into_inner();
        let outcome = match plugin_registered {
            true => RegistrationOutcome::Registered,
            false => RegistrationOutcome::Refused { error },
        };
        self.outcome.send_replace(outcome);
        Ok(Response::new(wire::RegistrationStatusResponse {}))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[tokio::test]
    async fn the_kubelet_learns_kind_name_endpoint_and_a_1_x_version() {
        let service =
            RegistrationService::new("/var/lib/kubelet/plugins/x/csi.sock", watch::channel(Default::default()).0);
        let answer = service.get_info(Request::new(wire::InfoRequest {})).await.unwrap().into_inner();
        assert_eq!((answer.r#type.as_str(), answer.name.as_str()), ("CSIPlugin", "csi.lamina.dev"));
        assert_eq!(answer.endpoint, "/var/lib/kubelet/plugins/x/csi.sock");
        assert!(answer.supported_versions.iter().all(|version| version.starts_with("1.")));
        assert!(!answer.supported_versions.is_empty());
    }

    #[tokio::test]
    async fn the_kubelets_last_word_reaches_the_program() {
        let (outcome, mut said) = watch::channel(RegistrationOutcome::Waiting);
        let service = RegistrationService::new("x", outcome);
        for (plugin_registered, error, expected) in [
            (false, "no", RegistrationOutcome::Refused { error: "no".to_owned() }),
            (true, "", RegistrationOutcome::Registered),
        ] {
            let status = wire::RegistrationStatus { plugin_registered, error: error.to_owned() };
            service.notify_registration_status(Request::new(status)).await.unwrap();
            said.changed().await.unwrap();
            assert_eq!(*said.borrow_and_update(), expected);
        }
    }
}
