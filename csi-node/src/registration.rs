//! Makes the plugin known to the kubelet: a socket in its `plugins_registry`, served anew when the kubelet refuses.
//!
//! Invariant: the CSI socket is served before this one appears, for the kubelet calls it at once.

use lamina_csi_api::DRIVER_NAME;
use lamina_csi_api::registration::{RegistrationOutcome, RegistrationService};
use lamina_csi_api::socket::{BoundSocket, SocketError};
use std::path::Path;
use std::time::Duration;
use tokio::sync::watch;
use tonic::transport::Server;

/// Before a refused plugin shows itself again; the kubelet gives no event for when it would be taken.
const AGAIN: Duration = Duration::from_secs(5);

/// Serve registration until `shutdown` turns true; `endpoint` is the CSI socket as the kubelet sees it.
///
/// # Errors
/// [`SocketError`] if the socket cannot be made.
pub async fn serve(
    directory: &Path,
    endpoint: &Path,
    outcome: watch::Sender<RegistrationOutcome>,
    shutdown: watch::Receiver<bool>,
) -> Result<(), SocketError> {
    serve_again(AGAIN, directory, endpoint, outcome, shutdown).await
}

async fn serve_again(
    pause: Duration,
    directory: &Path,
    endpoint: &Path,
    outcome: watch::Sender<RegistrationOutcome>,
    mut shutdown: watch::Receiver<bool>,
) -> Result<(), SocketError> {
    let path = directory.join(format!("{DRIVER_NAME}-reg.sock"));
    while !*shutdown.borrow() {
        outcome.send_replace(RegistrationOutcome::Waiting);
        let service = RegistrationService::new(endpoint.display().to_string(), outcome.clone());
        let router = Server::builder().add_service(service.into_server());
        let mut said = outcome.subscribe();
        let mut ends = shutdown.clone();
        let again = async move {
            tokio::select! {
                refusal = said.wait_for(|said| matches!(said, RegistrationOutcome::Refused { .. })) => {
                    if let Ok(RegistrationOutcome::Refused { error }) = refusal.as_deref() {
                        tracing::error!(error, "the kubelet does not take the plugin; it is shown again");
                    }
                }
                _ = ends.wait_for(|end| *end) => {}
            }
        };
        BoundSocket::bind(&path).await?.serve(router, again).await?;
        let _ = tokio::time::timeout(pause, shutdown.wait_for(|end| *end)).await;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use lamina_csi_api::pluginregistration::registration_client::RegistrationClient;
    use lamina_csi_api::pluginregistration::{InfoRequest, RegistrationStatus};
    use tonic::transport::{Channel, Endpoint};

    async fn client(directory: &Path) -> RegistrationClient<Channel> {
        let path = directory.join(format!("{DRIVER_NAME}-reg.sock"));
        let connect = tower::service_fn(move |_| {
            let path = path.clone();
            async move { tokio::net::UnixStream::connect(path).await.map(hyper_util::rt::TokioIo::new) }
        });
        loop {
            let endpoint = Endpoint::from_static("http://kubelet");
            match endpoint.connect_with_connector(connect.clone()).await {
                Ok(channel) => return RegistrationClient::new(channel),
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        }
    }

    #[tokio::test]
    async fn a_refused_plugin_shows_a_fresh_socket() {
        let directory = tempfile::tempdir().unwrap();
        let (outcome, mut said) = watch::channel(RegistrationOutcome::Waiting);
        let (end, ends) = watch::channel(false);
        let at = directory.path().to_owned();
        let pause = Duration::from_millis(20);
        let serving = tokio::spawn(async move { serve_again(pause, &at, Path::new("/csi.sock"), outcome, ends).await });
        let mut kubelet = client(directory.path()).await;
        let told = kubelet.get_info(InfoRequest {}).await.unwrap().into_inner();
        assert_eq!((told.name.as_str(), told.endpoint.as_str()), (DRIVER_NAME, "/csi.sock"));
        let refusal = RegistrationStatus { plugin_registered: false, error: "not now".into() };
        kubelet.notify_registration_status(refusal).await.unwrap();
        drop(kubelet);
        said.wait_for(|said| *said == RegistrationOutcome::Waiting).await.unwrap();
        let mut kubelet = client(directory.path()).await;
        let taken = RegistrationStatus { plugin_registered: true, error: String::new() };
        kubelet.notify_registration_status(taken).await.unwrap();
        said.wait_for(|said| *said == RegistrationOutcome::Registered).await.unwrap();
        drop(kubelet);
        end.send_replace(true);
        serving.await.unwrap().unwrap();
        assert!(!directory.path().join(format!("{DRIVER_NAME}-reg.sock")).exists());
    }
}
