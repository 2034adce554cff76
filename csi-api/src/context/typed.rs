//! The contexts of this plugin, each with its keys.
//!
//! Invariant: [`VolumeContext`] and [`PublishContext`] read back what they wrote.

use std::collections::HashMap;
use std::fmt;
use std::num::NonZeroU64;
use std::str::FromStr;

use super::{ContextError, ContextValue, Entries, Source};
use crate::name::{is_dns_subdomain, parse_id};

const POLICY: &str = "policy";
const CLAIM_NAME: &str = "csi.storage.k8s.io/pvc/name";
const CLAIM_NAMESPACE: &str = "csi.storage.k8s.io/pvc/namespace";
const OBJECT: &str = "volume";
const SESSION: &str = "session";
const GENERATION: &str = "generation";

/// A text that is not of its kind; the reader says which kind was expected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not of the expected kind")]
pub struct WrongKind;

/// The name of a Kubernetes object.
#[derive(Clone, Debug, PartialEq, Eq)]
struct ObjectName(String);

impl FromStr for ObjectName {
    type Err = WrongKind;

    fn from_str(text: &str) -> Result<Self, WrongKind> {
        if is_dns_subdomain(text) { Ok(Self(text.to_owned())) } else { Err(WrongKind) }
    }
}

impl ContextValue for ObjectName {
    const EXPECTED: &'static str = "the name of a Kubernetes object";
}

/// The name of a `ReplicationPolicy`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PolicyName(String);

impl PolicyName {
    /// As Kubernetes spells it.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for PolicyName {
    type Err = WrongKind;

    fn from_str(text: &str) -> Result<Self, WrongKind> {
        text.parse::<ObjectName>().map(|ObjectName(name)| Self(name))
    }
}

impl ContextValue for PolicyName {
    const EXPECTED: &'static str = "the name of a ReplicationPolicy";
}

impl fmt::Display for PolicyName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Whose wish a volume is; for people, nothing depends on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    /// Of the PersistentVolumeClaim.
    pub namespace: String,
    /// Of the PersistentVolumeClaim.
    pub name: String,
}

/// What a StorageClass says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreateParameters {
    /// Key `policy`: the shape of the volume.
    pub policy: PolicyName,
    /// The claim, if the provisioner says (`--extra-create-metadata`).
    pub claim: Option<Claim>,
}

impl CreateParameters {
    /// Reads the parameters of a CreateVolume.
    ///
    /// # Errors
    /// [`ContextError`].
    pub fn parse(entries: &HashMap<String, String>) -> Result<Self, ContextError> {
        let mut reader = Entries::new(Source::Parameters, entries);
        let policy = reader.required(POLICY)?;
        let namespace: Option<ObjectName> = reader.optional(CLAIM_NAMESPACE)?;
        let name: Option<ObjectName> = reader.optional(CLAIM_NAME)?;
        reader.finish()?;
        let claim = namespace.zip(name).map(|(namespace, name)| Claim { namespace: namespace.0, name: name.0 });
        Ok(Self { policy, claim })
    }

    /// Reads the parameters of a call that asks about volumes in general or about an existing one (GetCapacity,
    /// ValidateVolumeCapabilities): there they may all be absent.
    ///
    /// # Errors
    /// [`ContextError`].
    pub fn parse_if_any(entries: &HashMap<String, String>) -> Result<Option<Self>, ContextError> {
        if entries.is_empty() { Ok(None) } else { Self::parse(entries).map(Some) }
    }
}

/// What a volume takes along: a short cut to its object, which spares a search by id. A PersistentVolume written by hand
/// need not have it.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct VolumeContext {
    /// Key `volume`: the name of the `Volume` object. The handle decides: an object with another id is not the volume.
    pub object: Option<String>,
}

impl VolumeContext {
    /// Reads the volume context of any call.
    ///
    /// # Errors
    /// [`ContextError`].
    pub fn parse(entries: &HashMap<String, String>) -> Result<Self, ContextError> {
        let mut reader = Entries::new(Source::VolumeContext, entries);
        let object: Option<ObjectName> = reader.optional(OBJECT)?;
        reader.finish()?;
        Ok(Self { object: object.map(|ObjectName(name)| name) })
    }

    /// As CreateVolume answers it.
    #[must_use]
    pub fn to_wire(&self) -> HashMap<String, String> {
        self.object.iter().map(|name| (OBJECT.to_owned(), name.clone())).collect()
    }
}

/// What the node needs to open the volume: which session it is to use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PublishContext {
    /// Key `session`: 128 bits, never zero; 32 lower-case hexadecimal digits on the wire.
    pub session: u128,
    /// Key `generation`: that of a map which admits the session; an older map is of no use to the node.
    pub generation: NonZeroU64,
}

/// A 128-bit id as text.
struct Id(u128);

impl FromStr for Id {
    type Err = WrongKind;

    fn from_str(text: &str) -> Result<Self, WrongKind> {
        parse_id(text).map(Self).ok_or(WrongKind)
    }
}

impl ContextValue for Id {
    const EXPECTED: &'static str = "32 lower-case hexadecimal digits, not all zero";
}

impl ContextValue for NonZeroU64 {
    const EXPECTED: &'static str = "a whole number above zero";
}

impl PublishContext {
    /// Reads the publish context of a node's call.
    ///
    /// # Errors
    /// [`ContextError`].
    pub fn parse(entries: &HashMap<String, String>) -> Result<Self, ContextError> {
        let mut reader = Entries::new(Source::PublishContext, entries);
        let Id(session) = reader.required(SESSION)?;
        let generation = reader.required(GENERATION)?;
        reader.finish()?;
        Ok(Self { session, generation })
    }

    /// As ControllerPublishVolume answers it.
    #[must_use]
    pub fn to_wire(&self) -> HashMap<String, String> {
        HashMap::from([
            (SESSION.to_owned(), format!("{:032x}", self.session)),
            (GENERATION.to_owned(), self.generation.to_string()),
        ])
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn map(entries: &[(&str, &str)]) -> HashMap<String, String> {
        entries.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn a_storage_class_without_policy_or_with_a_strange_one_is_refused() {
        let read = |entries: &[(&str, &str)]| CreateParameters::parse(&map(entries)).unwrap_err().to_string();
        assert!(read(&[]).contains("\"policy\""));
        assert!(read(&[("policy", "No Such_Name")]).contains("\"policy\""));
        assert!(read(&[("policy", "two"), ("polcy", "two")]).contains("\"polcy\""));
    }

    #[test]
    fn the_provisioners_own_parameters_are_understood() {
        let entries = map(&[
            ("policy", "two-copies"),
            (CLAIM_NAME, "db"),
            (CLAIM_NAMESPACE, "shop"),
            ("csi.storage.k8s.io/pv/name", "pvc-1"),
        ]);
        let read = CreateParameters::parse(&entries).unwrap();
        assert_eq!(read.policy.as_str(), "two-copies");
        assert_eq!(read.claim, Some(Claim { namespace: "shop".to_owned(), name: "db".to_owned() }));
        assert_eq!(CreateParameters::parse_if_any(&HashMap::new()), Ok(None));
        assert_eq!(CreateParameters::parse_if_any(&entries), Ok(Some(read)));
    }

    #[test]
    fn a_volume_context_reads_back_and_may_be_absent() {
        for object in [None, Some("pvc-1".to_owned())] {
            let context = VolumeContext { object };
            assert_eq!(VolumeContext::parse(&context.to_wire()), Ok(context));
        }
    }

    #[test]
    fn a_publish_context_reads_back_and_is_whole_or_refused() {
        let context = PublishContext { session: 0xabc, generation: NonZeroU64::new(7).unwrap() };
        let entries = context.to_wire();
        assert_eq!(PublishContext::parse(&entries), Ok(context));
        for key in entries.keys() {
            let mut partial = entries.clone();
            partial.remove(key);
            let refusal = PublishContext::parse(&partial).unwrap_err().to_string();
            assert!(refusal.contains(key.as_str()), "{refusal}");
            let mut spoilt = entries.clone();
            spoilt.insert(key.clone(), "0".to_owned());
            assert!(PublishContext::parse(&spoilt).is_err());
        }
        assert!(PublishContext::parse(&map(&[("device", "/dev/mock")])).is_err());
    }
}
