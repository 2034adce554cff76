//! What callers call volumes and nodes: the handle of a volume, the name that a new volume is asked for under, the name of a
//! node.
//!
//! Invariants: the handle is the volume's id and never its name (architecture, "The CSI volume handle is the volume's id");
//! two different CSI names never lead to the same object name.

use std::fmt;
use std::str::FromStr;

use sha2::{Digest, Sha256};
use tonic::Status;

/// CSI's limit for a name, bytes.
pub const MAX_NAME_BYTES: usize = 128;

/// Longest name of a Kubernetes object of ours that also fits a label's value, bytes.
const MAX_OBJECT_NAME_BYTES: usize = 63;

/// Longest DNS subdomain, which is what Kubernetes takes for the name of a node, bytes.
const MAX_NODE_NAME_BYTES: usize = 253;

/// Object names made from a digest begin so.
const DIGEST_PREFIX: &str = "csi-";

/// A handle or a name that can not be what it should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// The request is incomplete: INVALID_ARGUMENT.
    #[error("{field} is required")]
    Empty {
        /// As spelled in the .proto.
        field: &'static str,
    },
    /// No volume of ours has such a handle, so there is none: NOT_FOUND. A delete takes it for success.
    #[error("volume_id is not a handle of this plugin (32 lower-case hexadecimal digits), so there is no such volume")]
    ForeignHandle,
    /// No node can have such a name, so there is none: NOT_FOUND.
    #[error("node_id is not the name of a Kubernetes node, so there is no such node")]
    ForeignNode,
    /// CSI allows no such name: INVALID_ARGUMENT.
    #[error("name must have at most {MAX_NAME_BYTES} bytes and no control characters")]
    BadName,
}

impl From<NameError> for Status {
    fn from(error: NameError) -> Self {
        match error {
            NameError::Empty { .. } | NameError::BadName => Status::invalid_argument(error.to_string()),
            NameError::ForeignHandle | NameError::ForeignNode => Status::not_found(error.to_string()),
        }
    }
}

/// A volume as callers name it: its id, 32 lower-case hexadecimal digits. Never zero.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VolumeHandle(u128);

impl VolumeHandle {
    /// The handle of the volume with this id.
    ///
    /// # Panics
    /// If `id` is zero, which names nothing: a caller would hand out a handle that no later call accepts.
    #[must_use]
    pub fn new(id: u128) -> Self {
        assert!(id != 0, "a volume's id is never zero");
        Self(id)
    }

    /// The volume's id, never zero.
    #[must_use]
    pub const fn id(self) -> u128 {
        self.0
    }
}

impl FromStr for VolumeHandle {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        if text.is_empty() {
            return Err(NameError::Empty { field: "volume_id" });
        }
        match parse_id(text) {
            Some(id) => Ok(Self(id)),
            None => Err(NameError::ForeignHandle),
        }
    }
}

impl fmt::Display for VolumeHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Debug for VolumeHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VolumeHandle({self})")
    }
}

/// 32 lower-case hexadecimal digits, not all zero. One spelling only, so that equal ids are equal texts.
pub(crate) fn parse_id(text: &str) -> Option<u128> {
    let digits = text.len() == 32 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    if !digits {
        return None;
    }
    u128::from_str_radix(text, 16).ok().filter(|id| *id != 0)
}

/// The name under which a volume or snapshot is asked for; the same name again means the same thing.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestName(String);

impl RequestName {
    /// The name as the caller gave it.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// A name for the Kubernetes object, at most 63 bytes, a DNS label: the caller's own if it is one (the provisioner's
    /// `pvc-<uid>` is), else `csi-` and half of its SHA-256. Callers may use capitals and 128 bytes, Kubernetes may not. A
    /// caller's name that looks like a digest is digested as well, so that no two names meet.
    #[must_use]
    pub fn object_name(&self) -> String {
        if is_dns_label(&self.0) && !self.0.starts_with(DIGEST_PREFIX) {
            return self.0.clone();
        }
        let digest = Sha256::digest(self.0.as_bytes());
        let mut name = String::from(DIGEST_PREFIX);
        for byte in &digest[..16] {
            name.push_str(&format!("{byte:02x}"));
        }
        name
    }
}

impl FromStr for RequestName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        if text.is_empty() {
            return Err(NameError::Empty { field: "name" });
        }
        if text.len() > MAX_NAME_BYTES || text.chars().any(char::is_control) {
            return Err(NameError::BadName);
        }
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Display for RequestName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A node: the name of its Kubernetes object, which is also the `node_id` that NodeGetInfo answers.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeName(String);

impl NodeName {
    /// The name as Kubernetes spells it.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for NodeName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        if text.is_empty() {
            return Err(NameError::Empty { field: "node_id" });
        }
        if is_dns_subdomain(text) { Ok(Self(text.to_owned())) } else { Err(NameError::ForeignNode) }
    }
}

impl fmt::Display for NodeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// RFC 1123 label as Kubernetes uses it.
fn is_dns_label(text: &str) -> bool {
    let inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    !text.is_empty()
        && text.len() <= MAX_OBJECT_NAME_BYTES
        && text.bytes().all(inner)
        && !text.starts_with('-')
        && !text.ends_with('-')
}

/// RFC 1123 subdomain as Kubernetes uses it for most objects.
pub(crate) fn is_dns_subdomain(text: &str) -> bool {
    text.len() <= MAX_NODE_NAME_BYTES && text.split('.').all(is_dns_label)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use tonic::Code;

    fn code_of(text: &str) -> Code {
        Status::from(text.parse::<VolumeHandle>().unwrap_err()).code()
    }

    #[test]
    fn a_handle_survives_its_own_spelling() {
        for id in [1, 0xabc, u128::MAX, 1 << 64] {
            let handle = VolumeHandle::new(id);
            assert_eq!(handle.to_string().len(), 32);
            assert_eq!(handle.to_string().parse::<VolumeHandle>().unwrap(), handle);
            assert_eq!(handle.id(), id);
        }
    }

    #[test]
    fn an_empty_handle_is_the_callers_mistake_and_a_foreign_one_is_no_volume() {
        assert_eq!(code_of(""), Code::InvalidArgument);
        let upper = VolumeHandle::new(0xabc).to_string().to_uppercase();
        let zero = "0".repeat(32);
        let long = "a".repeat(33);
        for foreign in
            ["fake-vol-id", upper.as_str(), zero.as_str(), long.as_str(), "+123456789012345678901234567890ab"]
        {
            assert_eq!(code_of(foreign), Code::NotFound, "{foreign}");
        }
    }

    #[test]
    fn a_provisioners_name_is_kept_as_object_name() {
        let name: RequestName = "pvc-5a0f7c1e-0d6f-4d53-9a43-3a1d3d1b9d5e".parse().unwrap();
        assert_eq!(name.object_name(), name.as_str());
    }

    #[test]
    fn names_that_kubernetes_refuses_get_object_names_that_never_meet() {
        let longest = "a".repeat(MAX_NAME_BYTES);
        let names = ["Sanity-1A", "sanity-1A", "sanity_1a", "a/b", "-a", "a-", "ä", longest.as_str(), "csi-x"];
        let mut seen = std::collections::BTreeSet::new();
        for text in names {
            let object = text.parse::<RequestName>().unwrap().object_name();
            assert!(is_dns_label(&object), "{object}");
            // A caller who asks for that digest by name gets yet another object.
            let mimic = object.parse::<RequestName>().unwrap().object_name();
            assert!(seen.insert(object), "{text}");
            assert!(seen.insert(mimic), "{text}");
        }
    }

    #[test]
    fn a_name_that_csi_forbids_is_refused() {
        let long = "a".repeat(MAX_NAME_BYTES + 1);
        for bad in ["a\nb", "\u{7f}", long.as_str()] {
            assert_eq!(bad.parse::<RequestName>(), Err(NameError::BadName), "{bad:?}");
        }
        assert_eq!("".parse::<RequestName>(), Err(NameError::Empty { field: "name" }));
    }

    #[test]
    fn a_node_that_cannot_exist_is_not_found() {
        assert!("node-1.example".parse::<NodeName>().is_ok());
        assert_eq!("Node_1".parse::<NodeName>(), Err(NameError::ForeignNode));
        assert_eq!("".parse::<NodeName>(), Err(NameError::Empty { field: "node_id" }));
        assert_eq!(Status::from(NameError::ForeignNode).code(), Code::NotFound);
    }
}
