//! The server itself: starts, stores, forgets what an older copy did not have, and leaves nothing behind.
#![allow(clippy::unwrap_used)]

use k8s_openapi::api::core::v1::Namespace;
use kube::Api;
use kube::api::PostParams;
use serde_json::json;

fn namespace(name: &str) -> Namespace {
    serde_json::from_value(json!({"metadata": {"name": name}})).unwrap()
}

#[tokio::test]
async fn an_old_copy_brings_back_the_old_objects_and_nothing_is_left_behind() {
    let Some(mut server) = lamina_test_apiserver::start_or_skip("an_old_copy_brings_back_the_old_objects").await else {
        return;
    };
    let namespaces = |client| Api::<Namespace>::all(client);
    let client = server.client().await.unwrap();
    namespaces(client.clone()).create(&PostParams::default(), &namespace("before")).await.unwrap();
    let saved = server.save().await.unwrap();
    let api = namespaces(server.client().await.unwrap());
    api.create(&PostParams::default(), &namespace("after")).await.unwrap();
    server.restore(&saved).await.unwrap();
    let api = namespaces(server.client().await.unwrap());
    assert!(api.get("before").await.is_ok());
    assert!(api.get_opt("after").await.unwrap().is_none());

    let nobody = namespaces(server.client_as("nobody", &["system:authenticated"]).await.unwrap());
    let refused = nobody.get("before").await.unwrap_err();
    assert!(matches!(&refused, kube::Error::Api(status) if status.code == 403), "{refused}");

    let (folder, url) = (server.kubeconfig().parent().unwrap().to_owned(), server.url());
    drop(server);
    assert!(!folder.exists());
    let port: u16 = url.rsplit(':').next().unwrap().parse().unwrap();
    assert!(std::net::TcpStream::connect(("127.0.0.1", port)).is_err());
}
