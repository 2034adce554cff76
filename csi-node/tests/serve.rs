//! The program itself, as the DaemonSet starts it: on a real kube-apiserver, with its sockets and pages.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used)]

use lamina_csi_api::pluginregistration::InfoRequest;
use lamina_csi_api::pluginregistration::registration_client::RegistrationClient;
use lamina_csi_api::v1;
use lamina_csi_api::v1::identity_client::IdentityClient;
use lamina_csi_api::v1::node_client::NodeClient;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tonic::transport::{Channel, Endpoint};

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

async fn connect(path: &Path) -> Channel {
    let at = path.to_owned();
    let connector = tower::service_fn(move |_| {
        let at = at.clone();
        async move { tokio::net::UnixStream::connect(at).await.map(hyper_util::rt::TokioIo::new) }
    });
    let asked = Instant::now();
    loop {
        match Endpoint::from_static("http://node").connect_with_connector(connector.clone()).await {
            Ok(channel) => return channel,
            Err(error) => assert!(asked.elapsed() < Duration::from_secs(60), "{}: {error}", path.display()),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn page(port: u16, path: &str) -> String {
    let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

#[tokio::test]
async fn the_program_serves_csi_registration_and_pages_and_ends_when_asked() {
    let Some(server) = lamina_test_apiserver::start_or_skip("the_program_serves").await else { return };
    let directory = tempfile::tempdir().unwrap();
    let kubelet = directory.path();
    std::fs::create_dir_all(kubelet.join("plugins/csi.lamina.dev")).unwrap();
    std::fs::create_dir_all(kubelet.join("plugins_registry")).unwrap();
    let endpoint = kubelet.join("plugins/csi.lamina.dev/csi.sock");
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let mut program = Killed(
        Command::new(env!("CARGO_BIN_EXE_lamina-csi-node"))
            .args(["serve", "--node=n1", "--cluster=0000000000000000000000000000000a", "--namespace=lamina"])
            .arg(format!("--csi-endpoint={}", endpoint.display()))
            .arg(format!("--registration-dir={}", kubelet.join("plugins_registry").display()))
            .arg(format!("--kubelet-dir={}", kubelet.display()))
            .arg(format!("--metrics=127.0.0.1:{port}"))
            .env("KUBECONFIG", server.kubeconfig())
            .stdin(Stdio::null())
            .spawn()
            .unwrap(),
    );
    let channel = connect(&endpoint).await;
    let probe = IdentityClient::new(channel.clone()).probe(v1::ProbeRequest {}).await.unwrap().into_inner();
    assert_eq!(probe.ready, Some(true));
    let told = NodeClient::new(channel).node_get_info(v1::NodeGetInfoRequest {}).await.unwrap().into_inner();
    assert_eq!((told.node_id.as_str(), told.max_volumes_per_node), ("n1", 256));
    let topology = told.accessible_topology.unwrap().segments;
    assert_eq!(topology.get("topology.lamina.dev/node").map(String::as_str), Some("n1"));
    let registration = connect(&kubelet.join("plugins_registry/csi.lamina.dev-reg.sock")).await;
    let plugin = RegistrationClient::new(registration).get_info(InfoRequest {}).await.unwrap().into_inner();
    assert_eq!(plugin.endpoint, endpoint.display().to_string());
    for (path, expected) in [("/healthz", "200 OK"), ("/readyz", "200 OK"), ("/metrics", "lamina_client_volumes 0")] {
        let answer = page(port, path).await;
        assert!(answer.contains(expected), "{path}: {answer}");
    }
    let pid = rustix::process::Pid::from_raw(program.0.id() as i32).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    let ended = tokio::task::spawn_blocking(move || program.0.wait().unwrap()).await.unwrap();
    assert!(ended.success(), "{ended}");
    assert!(!endpoint.exists(), "its socket is gone");
}

#[test]
fn help_shows_how_to_export_a_volume_and_a_wrong_place_is_explained() {
    let program = || Command::new(env!("CARGO_BIN_EXE_lamina-csi-node"));
    let help = program().args(["export", "--help"]).output().unwrap();
    let text = String::from_utf8(help.stdout).unwrap();
    assert!(text.contains("unix:///tmp/v.sock") && text.contains("nbdinfo"), "{text}");
    let id = "0000000000000000000000000000000a";
    let wrong = program()
        .args(["export", "--cluster", id, "--volume", id, "--session", id, "--leader", "x:1", "--listen", "/tmp/x"])
        .output()
        .unwrap();
    assert!(!wrong.status.success());
    assert!(String::from_utf8_lossy(&wrong.stderr).contains("tcp://127.0.0.1:10809"));
}
