//! Who may talk to the API server, and how it proves itself: a certificate of its own, one administrator's token, a key for
//! service account tokens, and the kubeconfig that goes with them.
//!
//! Made anew for every server and worth nothing outside it: it listens on loopback only.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use rcgen::{CertificateParams, KeyPair};
use serde_json::json;

use crate::StartError;

#[derive(Debug)]
pub(crate) struct Credentials {
    pub(crate) certificate: PathBuf,
    pub(crate) key: PathBuf,
    pub(crate) tokens: PathBuf,
    pub(crate) service_account_key: PathBuf,
    pub(crate) service_account_public_key: PathBuf,
    pub(crate) kubeconfig: PathBuf,
}

impl Credentials {
    pub(crate) fn write(folder: &Path, port: u16) -> Result<Self, StartError> {
        let paths = Self {
            certificate: folder.join("apiserver.crt"),
            key: folder.join("apiserver.key"),
            tokens: folder.join("tokens.csv"),
            service_account_key: folder.join("service-account.key"),
            service_account_public_key: folder.join("service-account.pub"),
            kubeconfig: folder.join("kubeconfig"),
        };
        let key = KeyPair::generate()?;
        let names = ["127.0.0.1".to_owned(), "localhost".to_owned()];
        let certificate = CertificateParams::new(names)?.self_signed(&key)?;
        let service_account_key = KeyPair::generate()?;
        let token = token_of(&service_account_key);
        std::fs::write(&paths.certificate, certificate.pem())?;
        std::fs::write(&paths.key, key.serialize_pem())?;
        std::fs::write(&paths.service_account_key, service_account_key.serialize_pem())?;
        std::fs::write(&paths.service_account_public_key, service_account_key.public_key_pem())?;
        std::fs::write(&paths.tokens, format!("{token},admin,admin,system:masters\n"))?;
        std::fs::write(&paths.kubeconfig, kubeconfig(&paths, port, &token).to_string())?;
        Ok(paths)
    }
}

/// Random, because the key is: the first bytes of its public half.
fn token_of(key: &KeyPair) -> String {
    key.public_key_raw().iter().take(33).fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn kubeconfig(paths: &Credentials, port: u16, token: &str) -> serde_json::Value {
    // JSON is YAML.
    json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "test",
        "clusters": [{"name": "test", "cluster": {
            "server": format!("https://127.0.0.1:{port}"), "certificate-authority": paths.certificate,
        }}],
        "users": [{"name": "admin", "user": {"token": token}}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "admin"}}],
    })
}
