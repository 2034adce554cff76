//! The OCI image layout as one tar: `oci-layout`, `index.json`, and under `blobs/sha256` the layer, the configuration and the
//! manifest (OCI image-spec 1.1). The annotation `io.containerd.image.name` gives the name on import.
//!
//! Invariant: the file appears under its name only when it is whole.

use std::io::Cursor;
use std::path::Path;

use sha2::{Digest, Sha256};

use crate::host::{HostError, at};

use super::layer::Layer;
use super::{Recipe, hex};

const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

struct Blob {
    kind: &'static str,
    digest: String,
    bytes: Vec<u8>,
}

impl Blob {
    fn new(kind: &'static str, bytes: Vec<u8>) -> Self {
        Self { kind, digest: hex(&Sha256::digest(&bytes)), bytes }
    }

    fn descriptor(&self) -> serde_json::Value {
        let digest = format!("sha256:{}", self.digest);
        serde_json::json!({ "mediaType": self.kind, "digest": digest, "size": self.bytes.len() })
    }
}

/// Writes the image.
pub(super) fn write(to: &Path, recipe: &Recipe, layer: &Layer) -> Result<(), HostError> {
    let layer = Blob::new(LAYER, layer.tar.clone());
    let config = Blob::new(CONFIG, json(&configuration(recipe, &layer)));
    let manifest = Blob::new(
        MANIFEST,
        json(&serde_json::json!({
            "schemaVersion": 2, "mediaType": MANIFEST,
            "config": config.descriptor(), "layers": [layer.descriptor()],
        })),
    );
    let mut entry = manifest.descriptor();
    entry["annotations"] = serde_json::json!({ "io.containerd.image.name": recipe.name });
    let index = serde_json::json!({ "schemaVersion": 2, "manifests": [entry] });
    let parent = to.parent().expect("a file in the cache");
    at(parent, std::fs::create_dir_all(parent))?;
    let part = to.with_extension(format!("part-{}", std::process::id()));
    at(&part, write_tar(&part, &index, &[layer, config, manifest]))?;
    at(to, std::fs::rename(&part, to))
}

fn configuration(recipe: &Recipe, layer: &Blob) -> serde_json::Value {
    let env: Vec<String> = recipe.env.iter().map(|(name, value)| format!("{name}={value}")).collect();
    let mut run = serde_json::json!({ "Env": env, "Entrypoint": recipe.entrypoint });
    if let Some(user) = &recipe.run_as {
        run["User"] = serde_json::json!(user);
    }
    serde_json::json!({
        "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" },
        "os": "linux",
        "config": run,
        "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{}", layer.digest)] },
    })
}

fn write_tar(path: &Path, index: &serde_json::Value, blobs: &[Blob]) -> std::io::Result<()> {
    let mut builder = tar::Builder::new(std::io::BufWriter::new(std::fs::File::create(path)?));
    append(&mut builder, "oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
    append(&mut builder, "index.json", &json(index))?;
    for blob in blobs {
        append(&mut builder, &format!("blobs/sha256/{}", blob.digest), &blob.bytes)?;
    }
    builder.into_inner()?.into_inner().map_err(std::io::IntoInnerError::into_error)?.sync_all()
}

fn append<W: std::io::Write>(builder: &mut tar::Builder<W>, name: &str, bytes: &[u8]) -> std::io::Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_mode(0o644);
    header.set_mtime(0);
    header.set_size(bytes.len() as u64);
    builder.append_data(&mut header, name, Cursor::new(bytes))
}

fn json(value: &serde_json::Value) -> Vec<u8> {
    serde_json::to_vec(value).expect("plain values are JSON")
}
