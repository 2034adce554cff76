//! What the socket promises, seen from a client.

#![allow(clippy::unwrap_used)]

use super::*;
use crate::identity::{IdentityService, Readiness};
use crate::v1;
use crate::v1::identity_client::IdentityClient;
use tokio::sync::watch;
use tonic::transport::{Channel, Endpoint, Server};

fn router() -> Router {
    let (_, readiness) = watch::channel(Readiness::Ready);
    Server::builder().add_service(IdentityService::new(readiness).into_server())
}

async fn client(path: &Path) -> IdentityClient<Channel> {
    let endpoint = Endpoint::from_shared(format!("unix:{}", path.display())).unwrap();
    IdentityClient::new(endpoint.connect().await.unwrap())
}

async fn is_ready(path: &Path) -> bool {
    client(path).await.probe(v1::ProbeRequest {}).await.unwrap().into_inner().ready == Some(true)
}

/// Serves until the sender is dropped or sent.
async fn serving(path: &Path) -> (oneshot::Sender<()>, tokio::task::JoinHandle<Result<(), SocketError>>) {
    let (stop, stopped) = oneshot::channel();
    let socket = BoundSocket::bind(path).await.unwrap();
    let shutdown = async move {
        let _ = stopped.await;
    };
    (stop, tokio::spawn(socket.serve(router(), shutdown)))
}

fn names_in(directory: &Path) -> Vec<String> {
    let name = |entry: io::Result<fs::DirEntry>| entry.unwrap().file_name().into_string().unwrap();
    fs::read_dir(directory).unwrap().map(name).collect()
}

#[tokio::test]
async fn only_the_owner_may_connect_and_the_socket_goes_at_the_end() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("csi.sock");
    let (stop, server) = serving(&path).await;
    assert_eq!(names_in(directory.path()), ["csi.sock"]);
    assert_eq!(fs::symlink_metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    assert!(is_ready(&path).await);
    stop.send(()).unwrap();
    server.await.unwrap().unwrap();
    assert!(names_in(directory.path()).is_empty());
}

#[tokio::test]
async fn a_socket_that_nobody_answers_on_is_replaced() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("csi.sock");
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let (_stop, _server) = serving(&path).await;
    assert!(is_ready(&path).await);
}

#[tokio::test]
async fn a_socket_that_somebody_serves_is_left_to_him() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("csi.sock");
    let (_stop, _server) = serving(&path).await;
    let refused = BoundSocket::bind(&path).await.unwrap_err();
    assert!(matches!(refused, SocketError::InUse { .. }), "{refused}");
    assert!(is_ready(&path).await);
}

#[tokio::test]
async fn nothing_but_a_socket_is_ever_replaced() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("file");
    fs::write(&file, "precious").unwrap();
    let link = directory.path().join("link");
    std::os::unix::fs::symlink(&file, &link).unwrap();
    for path in [file.as_path(), link.as_path(), directory.path()] {
        let refused = BoundSocket::bind(path).await.unwrap_err();
        assert!(matches!(refused, SocketError::NotASocket { .. }), "{refused}");
    }
    assert_eq!(fs::read_to_string(&file).unwrap(), "precious");
}

#[tokio::test]
async fn a_path_that_no_client_could_dial_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let refused = BoundSocket::bind(directory.path().join("a".repeat(108))).await.unwrap_err();
    assert!(matches!(refused, SocketError::System { .. }), "{refused}");
    assert!(names_in(directory.path()).is_empty());
}

#[tokio::test]
async fn the_successors_socket_is_not_removed() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("csi.sock");
    let first = BoundSocket::bind(&path).await.unwrap();
    fs::remove_file(&path).unwrap();
    let (_stop, _server) = serving(&path).await;
    drop(first);
    assert!(is_ready(&path).await);
}

#[tokio::test]
async fn an_idle_client_does_not_hold_up_the_end() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("csi.sock");
    let (stop, server) = serving(&path).await;
    let mut idle = client(&path).await;
    idle.probe(v1::ProbeRequest {}).await.unwrap();
    stop.send(()).unwrap();
    tokio::time::timeout(GRACE / 2, server).await.expect("an idle connection ends at once").unwrap().unwrap();
    assert!(!path.exists());
}

/// An Identity whose Probe never ends.
struct Stuck(tokio::sync::Notify);

#[tonic::async_trait]
impl v1::identity_server::Identity for std::sync::Arc<Stuck> {
    async fn probe(
        &self,
        _request: tonic::Request<v1::ProbeRequest>,
    ) -> Result<tonic::Response<v1::ProbeResponse>, tonic::Status> {
        self.0.notify_one();
        std::future::pending().await
    }
}

#[tokio::test]
async fn a_call_that_never_ends_does_not_hold_up_the_end_for_ever() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("csi.sock");
    let stuck = std::sync::Arc::new(Stuck(tokio::sync::Notify::new()));
    let service = v1::identity_server::IdentityServer::new(std::sync::Arc::clone(&stuck));
    let (stop, stopped) = oneshot::channel::<()>();
    let socket = BoundSocket::bind(&path).await.unwrap();
    let shutdown = async move {
        let _ = stopped.await;
    };
    let router = Server::builder().add_service(service);
    let server = tokio::spawn(socket.serve_with(Duration::from_millis(50), router, shutdown));
    let mut caller = client(&path).await;
    let call = tokio::spawn(async move { caller.probe(v1::ProbeRequest {}).await });
    stuck.0.notified().await;
    stop.send(()).unwrap();
    server.await.unwrap().unwrap();
    assert!(!path.exists());
    assert!(!call.is_finished());
    call.abort();
}
