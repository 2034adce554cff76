//! The maps of text that travel with CSI calls, read as typed values.
//!
//! Invariants: every key that somebody set is either understood, or of the platform's own, or refused by name: a misspelt
//! parameter never goes unnoticed. What is written for a later call reads back as the same value. No value appears in an
//! error, only its key.
//!
//! | map | who writes | who reads |
//! |---|---|---|
//! | parameters | the StorageClass | CreateVolume: [`CreateParameters`] |
//! | volume context | CreateVolume, or a person in a PersistentVolume | every later call: [`VolumeContext`] |
//! | publish context | ControllerPublishVolume | the node's calls: [`PublishContext`] |

use std::collections::HashMap;
use std::fmt;
use std::str::FromStr;

use tonic::Status;

mod typed;

pub use typed::{Claim, CreateParameters, PolicyName, PublishContext, VolumeContext};

/// Which map of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// From the StorageClass.
    Parameters,
    /// From the VolumeAttributesClass.
    MutableParameters,
    /// From CreateVolume or the PersistentVolume.
    VolumeContext,
    /// From ControllerPublishVolume.
    PublishContext,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Parameters => "parameters",
            Self::MutableParameters => "mutable_parameters",
            Self::VolumeContext => "volume_context",
            Self::PublishContext => "publish_context",
        })
    }
}

/// An entry that is missing, wrong or unknown. All are the caller's mistake and INVALID_ARGUMENT.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ContextError {
    /// There is no entry, or an empty one.
    #[error("{map}[{key:?}] is required")]
    Missing {
        /// Where it should be.
        map: Source,
        /// Its key.
        key: &'static str,
    },
    /// The value is not of its kind.
    #[error("{map}[{key:?}] must be {expected}")]
    Malformed {
        /// Where it is.
        map: Source,
        /// Its key.
        key: &'static str,
        /// The kind, in words that end this sentence.
        expected: &'static str,
    },
    /// Nothing here knows the key.
    #[error("{map}[{key:?}] is not known")]
    Unknown {
        /// Where it is.
        map: Source,
        /// Its key.
        key: String,
    },
}

impl From<ContextError> for Status {
    fn from(error: ContextError) -> Self {
        Status::invalid_argument(error.to_string())
    }
}

/// A value of a context: how to read it and what to say if that fails.
pub trait ContextValue: FromStr {
    /// Ends the sentence "… must be".
    const EXPECTED: &'static str;
}

/// Reads one map entry by entry and remembers which ones; [`Self::finish`] refuses the rest.
#[derive(Debug)]
pub struct Entries<'a> {
    map: Source,
    entries: &'a HashMap<String, String>,
    known: Vec<&'static str>,
}

impl<'a> Entries<'a> {
    /// Begins to read.
    #[must_use]
    pub fn new(map: Source, entries: &'a HashMap<String, String>) -> Self {
        Self { map, entries, known: Vec::new() }
    }

    /// The value of a key that need not be there; empty counts as absent.
    ///
    /// # Errors
    /// [`ContextError::Malformed`].
    pub fn optional<T: ContextValue>(&mut self, key: &'static str) -> Result<Option<T>, ContextError> {
        self.known.push(key);
        let Some(text) = self.entries.get(key).filter(|text| !text.is_empty()) else { return Ok(None) };
        let malformed = |_| ContextError::Malformed { map: self.map, key, expected: T::EXPECTED };
        text.parse().map(Some).map_err(malformed)
    }

    /// The value of a key that must be there.
    ///
    /// # Errors
    /// [`ContextError::Missing`], [`ContextError::Malformed`].
    pub fn required<T: ContextValue>(&mut self, key: &'static str) -> Result<T, ContextError> {
        let map = self.map;
        self.optional(key)?.ok_or(ContextError::Missing { map, key })
    }

    /// Ends the reading.
    ///
    /// # Errors
    /// [`ContextError::Unknown`] with the first key, in alphabetical order, that was not asked for and is not the platform's.
    pub fn finish(self) -> Result<(), ContextError> {
        let foreign = |key: &&String| !self.known.contains(&key.as_str()) && !is_platform_key(key);
        match self.entries.keys().filter(foreign).min() {
            Some(key) => Err(ContextError::Unknown { map: self.map, key: key.clone() }),
            None => Ok(()),
        }
    }
}

/// Kubernetes and its sidecars add keys of their own (`csi.storage.k8s.io/pod.name`,
/// `storage.kubernetes.io/csiProvisionerIdentity`) and more with every release.
fn is_platform_key(key: &str) -> bool {
    let Some((domain, _)) = key.split_once('/') else { return false };
    ["kubernetes.io", "k8s.io"].iter().any(|platform| match domain.strip_suffix(platform) {
        Some(rest) => rest.is_empty() || rest.ends_with('.'),
        None => false,
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use tonic::Code;

    #[derive(Debug, PartialEq)]
    struct Number(u8);

    impl FromStr for Number {
        type Err = std::num::ParseIntError;
        fn from_str(text: &str) -> Result<Self, Self::Err> {
            text.parse().map(Self)
        }
    }

    impl ContextValue for Number {
        const EXPECTED: &'static str = "a number from 0 to 255";
    }

    fn map(entries: &[(&str, &str)]) -> HashMap<String, String> {
        entries.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    fn refusal(result: Result<impl fmt::Debug, ContextError>) -> String {
        let status = Status::from(result.unwrap_err());
        assert_eq!(status.code(), Code::InvalidArgument);
        status.message().to_owned()
    }

    #[test]
    fn a_missing_or_malformed_entry_is_refused_by_map_and_key_without_its_value() {
        let entries = map(&[("size", "secret"), ("empty", "")]);
        let mut reader = Entries::new(Source::Parameters, &entries);
        let message = refusal(reader.required::<Number>("size"));
        assert_eq!(message, "parameters[\"size\"] must be a number from 0 to 255");
        assert_eq!(refusal(reader.required::<Number>("empty")), "parameters[\"empty\"] is required");
        assert_eq!(reader.optional::<Number>("empty"), Ok(None));
        assert_eq!(reader.optional::<Number>("absent"), Ok(None));
    }

    #[test]
    fn a_misspelt_key_is_refused_by_name() {
        let entries = map(&[("size", "7"), ("sise", "7")]);
        let mut reader = Entries::new(Source::VolumeContext, &entries);
        assert_eq!(reader.required("size"), Ok(Number(7)));
        assert_eq!(refusal(reader.finish()), "volume_context[\"sise\"] is not known");
    }

    #[test]
    fn keys_of_the_platform_are_left_alone_and_look_alikes_are_not() {
        let theirs = map(&[
            ("csi.storage.k8s.io/pod.name", "p"),
            ("storage.kubernetes.io/csiProvisionerIdentity", "1"),
            ("kubernetes.io/x", ""),
        ]);
        assert_eq!(Entries::new(Source::VolumeContext, &theirs).finish(), Ok(()));
        for fake in ["evilk8s.io/x", "k8s.io", "k8s.io.evil/x"] {
            assert!(Entries::new(Source::VolumeContext, &map(&[(fake, "")])).finish().is_err(), "{fake}");
        }
    }
}
