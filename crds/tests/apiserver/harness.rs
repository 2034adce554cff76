//! A kube-apiserver with the manifests installed, and its answers with their warnings.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{ListParams, Patch, PatchParams, PostParams};
use kube::client::Body;
use kube::core::Request;
use kube::runtime::wait::{await_condition, conditions};
use kube::{Api, Client};
use lamina_test_apiserver::TestApiServer;
use serde_json::{Value, json};

pub(crate) const POLICIES: &str = "replicationpolicies";
pub(crate) const SERVERS: &str = "storageservers";
pub(crate) const VOLUMES: &str = "volumes";

/// An API server that knows Lamina's kinds.
pub(crate) struct Cluster {
    client: Client,
    _server: TestApiServer,
}

/// What the API server said.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) code: u16,
    pub(crate) body: Value,
    pub(crate) warnings: Vec<String>,
}

impl Cluster {
    /// Starts it and installs the manifests; `None` if the programs are not there, said by name.
    pub(crate) async fn start(test: &str) -> Option<Self> {
        let server = lamina_test_apiserver::start_or_skip(test).await?;
        let cluster = Self { client: server.client().await.unwrap(), _server: server };
        for manifest in lamina_crds::manifests().unwrap() {
            // Through the text: what the chart installs is what is tried.
            let crd: Value = serde_yaml::from_str(&manifest.yaml().unwrap()).unwrap();
            let path = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";
            let request = Request::new(path).create(&PostParams::default(), crd.to_string().into_bytes()).unwrap();
            cluster.send(request).await.accepted(&manifest.file);
            let crds: Api<CustomResourceDefinition> = Api::all(cluster.client.clone());
            let name = manifest.crd.metadata.name.clone().unwrap();
            await_condition(crds, &name, conditions::is_crd_established()).await.unwrap();
        }
        Some(cluster)
    }

    async fn send(&self, request: http::Request<Vec<u8>>) -> Answer {
        let answer = self.client.send(request.map(Body::from)).await.unwrap();
        let warnings = answer.headers().get_all("warning").iter();
        let warnings = warnings.map(|w| String::from_utf8_lossy(w.as_bytes()).into_owned()).collect();
        let code = answer.status().as_u16();
        let body = answer.into_body().collect_bytes().await.unwrap();
        let body = serde_json::from_slice(&body).unwrap_or_else(|_| json!(String::from_utf8_lossy(&body)));
        Answer { code, body, warnings }
    }

    fn path(kinds: &str) -> Request {
        Request::new(format!("/apis/lamina.dev/v1alpha1/{kinds}"))
    }

    pub(crate) async fn create(&self, kinds: &str, name: &str, spec: Value) -> Answer {
        let kind = match kinds {
            POLICIES => "ReplicationPolicy",
            SERVERS => "StorageServer",
            _ => "Volume",
        };
        let object = json!({
            "apiVersion": "lamina.dev/v1alpha1", "kind": kind, "metadata": {"name": name}, "spec": spec,
        });
        self.send(Self::path(kinds).create(&PostParams::default(), object.to_string().into_bytes()).unwrap()).await
    }

    /// Creates it, tries nothing else and takes it away again, so that cases do not touch each other.
    pub(crate) async fn try_create(&self, kinds: &str, spec: Value) -> Answer {
        let answer = self.create(kinds, "tried", spec).await;
        let request = Self::path(kinds).delete("tried", &Default::default()).unwrap();
        let _ = self.send(request).await;
        answer
    }

    pub(crate) async fn merge(&self, kinds: &str, name: &str, patch: Value) -> Answer {
        let request = Self::path(kinds).patch(name, &PatchParams::default(), &Patch::Merge(patch));
        self.send(request.unwrap()).await
    }

    pub(crate) async fn apply(&self, kinds: &str, name: &str, manager: &str, object: Value) -> Answer {
        let request = Self::path(kinds).patch(name, &PatchParams::apply(manager), &Patch::Apply(object));
        self.send(request.unwrap()).await
    }

    pub(crate) async fn merge_status(&self, kinds: &str, name: &str, status: Value) -> Answer {
        let patch = Patch::Merge(json!({ "status": status }));
        self.send(Self::path(kinds).patch_subresource("status", name, &PatchParams::default(), &patch).unwrap()).await
    }

    /// A JSON patch of the status, as the operator commits.
    pub(crate) async fn patch_status(&self, kinds: &str, name: &str, operations: Value) -> Answer {
        let patch: Patch<()> = Patch::Json(serde_json::from_value(operations).unwrap());
        self.send(Self::path(kinds).patch_subresource("status", name, &PatchParams::default(), &patch).unwrap()).await
    }

    /// Names of the objects that a field selector finds.
    pub(crate) async fn select(&self, kinds: &str, fields: &str) -> Vec<String> {
        let request = Self::path(kinds).list(&ListParams::default().fields(fields)).unwrap();
        let found = self.send(request).await.accepted(fields);
        let name = |object: &Value| object["metadata"]["name"].as_str().unwrap().to_owned();
        found["items"].as_array().unwrap().iter().map(name).collect()
    }

    /// What `kubectl get -o wide` prints of the only object: column names with cells.
    pub(crate) async fn printed(&self, kinds: &str) -> Vec<(String, String)> {
        let mut request = Self::path(kinds).list(&ListParams::default()).unwrap();
        let accept = "application/json;as=Table;g=meta.k8s.io;v=v1".parse().unwrap();
        request.headers_mut().insert("accept", accept);
        let table = self.send(request).await.accepted("print");
        let cells = table["rows"][0]["cells"].as_array().unwrap().iter();
        let cells = cells.map(|cell| cell.as_str().map_or_else(|| cell.to_string(), str::to_owned));
        let names = table["columnDefinitions"].as_array().unwrap().iter();
        names.map(|column| column["name"].as_str().unwrap().to_owned()).zip(cells).collect()
    }
}

impl Answer {
    /// The object; panics if it was refused or drew a warning.
    #[track_caller]
    pub(crate) fn accepted(self, what: &str) -> Value {
        assert!((200..300).contains(&self.code), "{what}: {}: {}", self.code, self.body["message"]);
        assert!(self.warnings.is_empty(), "{what}: {:?}", self.warnings);
        self.body
    }

    /// Panics unless it was refused in these words.
    #[track_caller]
    pub(crate) fn refused(self, what: &str, words: &str) {
        let message = self.body["message"].as_str().unwrap_or_default();
        assert_eq!(self.code, 422, "{what}: {message}");
        assert!(message.contains(words), "{what}: {message}");
    }
}
