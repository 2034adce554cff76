//! The manifests: one CustomResourceDefinition per kind, as the chart installs them.
//!
//! Invariant: generated from the types and nothing else; a golden test holds the chart's files to it. Two marks of the
//! derive are taken away: `nullable` (every optional field is left out instead, and the API server drops or refuses an
//! explicit null, so that `has()` in a rule means what it says) and line breaks inside a paragraph of a description.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::CustomResourceExt;
use serde_json::Value;

use crate::{ReplicationPolicy, StorageServer, Volume};

/// A CustomResourceDefinition and the file that it is installed from.
#[derive(Clone, Debug)]
pub struct Manifest {
    /// File name, such as `lamina.dev_volumes.yaml`.
    pub file: String,
    /// What is applied.
    pub crd: CustomResourceDefinition,
}

/// A manifest that could not be written as YAML, or a schema that is not one: a mistake in this crate's types.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// The schema did not survive the clean-up.
    #[error("the cleaned schema is no CustomResourceDefinition: {0}")]
    Schema(#[from] serde_json::Error),
    /// It could not be written.
    #[error("the manifest cannot be written as YAML: {0}")]
    Yaml(#[from] serde_yaml::Error),
}

const HEAD: &str = "\
# Generated from the types in crds/ by `crdgen`: change those, not this.
";

impl Manifest {
    fn of(crd: &CustomResourceDefinition) -> Result<Self, ManifestError> {
        let mut value = serde_json::to_value(crd)?;
        clean(&mut value);
        let crd: CustomResourceDefinition = serde_json::from_value(value)?;
        let file = format!("{}_{}.yaml", crd.spec.group, crd.spec.names.plural);
        Ok(Self { file, crd })
    }

    /// The text of the file.
    ///
    /// # Errors
    /// [`ManifestError::Yaml`] if it cannot be written, which is a mistake in this crate.
    pub fn yaml(&self) -> Result<String, ManifestError> {
        Ok(format!("{HEAD}{}", serde_yaml::to_string(&self.crd)?))
    }
}

/// Every kind's manifest, in the order in which to apply them.
///
/// # Errors
/// [`ManifestError::Schema`], which is a mistake in this crate.
pub fn manifests() -> Result<Vec<Manifest>, ManifestError> {
    [ReplicationPolicy::crd(), StorageServer::crd(), Volume::crd()].iter().map(Manifest::of).collect()
}

fn clean(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            if fields.get("nullable") == Some(&Value::Bool(true)) {
                fields.remove("nullable");
            }
            if let Some(Value::String(text)) = fields.get_mut("description") {
                *text = text.split("\n\n").map(|p| p.replace('\n', " ")).collect::<Vec<_>>().join("\n\n");
            }
            fields.values_mut().for_each(clean);
        }
        Value::Array(items) => items.iter_mut().for_each(clean),
        _ => {}
    }
}
