//! Places: which node, in which zone.
//!
//! Invariant: two keys and no other; what comes back from Kubernetes is what [`NodeTopology`] gave it. Every node can attach
//! every volume, so the places in a CreateVolume are wishes for where the first copy lies, and a new volume's
//! `accessible_topology` stays empty: with a node's place in it the volume would be bound to that node for ever.

use std::collections::HashMap;
use std::fmt;
use std::str::FromStr;

use tonic::Status;

use crate::name::NodeName;
use crate::v1;

/// The key whose value is the node's name.
pub const NODE_KEY: &str = "topology.lamina.dev/node";
/// The key whose value is the node's zone; absent where there are no zones.
pub const ZONE_KEY: &str = "topology.lamina.dev/zone";

/// Both become labels of the Node object, whose values are no longer, bytes.
const MAX_SEGMENT_BYTES: usize = 63;

/// A place that this plugin did not give out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TopologyError {
    /// Someone asks for a place by a key that means nothing here: INVALID_ARGUMENT.
    #[error("topology key {key} is not known; known are {NODE_KEY} and {ZONE_KEY}")]
    UnknownKey {
        /// As given.
        key: String,
    },
    /// No label can have this value: INVALID_ARGUMENT.
    #[error(
        "the value of topology key {key} must be a label value: 1 to 63 letters, digits, '-', '_' or '.', a letter or digit first and last"
    )]
    BadValue {
        /// As given.
        key: &'static str,
    },
    /// A place that names nothing: INVALID_ARGUMENT.
    #[error("a topology names neither {NODE_KEY} nor {ZONE_KEY}")]
    Nowhere,
}

impl From<TopologyError> for Status {
    fn from(error: TopologyError) -> Self {
        Status::invalid_argument(error.to_string())
    }
}

/// A zone: a label value.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Zone(String);

impl Zone {
    /// As in the label.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Zone {
    type Err = TopologyError;

    fn from_str(text: &str) -> Result<Self, TopologyError> {
        if is_label_value(text) { Ok(Self(text.to_owned())) } else { Err(TopologyError::BadValue { key: ZONE_KEY }) }
    }
}

impl fmt::Display for Zone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Where a node is: the answer of NodeGetInfo.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeTopology {
    node: NodeName,
    zone: Option<Zone>,
}

impl NodeTopology {
    /// The place of this node.
    ///
    /// # Errors
    /// [`TopologyError::BadValue`] if the node's name has more than 63 bytes: the kubelet could not label the node with it.
    pub fn new(node: NodeName, zone: Option<Zone>) -> Result<Self, TopologyError> {
        if is_label_value(node.as_str()) {
            Ok(Self { node, zone })
        } else {
            Err(TopologyError::BadValue { key: NODE_KEY })
        }
    }

    /// The node.
    #[must_use]
    pub const fn node(&self) -> &NodeName {
        &self.node
    }

    /// Its zone.
    #[must_use]
    pub const fn zone(&self) -> Option<&Zone> {
        self.zone.as_ref()
    }

    /// As CSI writes it.
    #[must_use]
    pub fn to_wire(&self) -> v1::Topology {
        let mut segments = HashMap::from([(NODE_KEY.to_owned(), self.node.to_string())]);
        if let Some(zone) = &self.zone {
            segments.insert(ZONE_KEY.to_owned(), zone.to_string());
        }
        v1::Topology { segments }
    }
}

/// A place that a request names; at least one of both is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// This node, if named.
    pub node: Option<NodeName>,
    /// This zone, if named.
    pub zone: Option<Zone>,
}

impl Place {
    /// Reads one topology.
    ///
    /// # Errors
    /// [`TopologyError`].
    pub fn parse(topology: &v1::Topology) -> Result<Self, TopologyError> {
        let mut place = Self { node: None, zone: None };
        for (key, value) in &topology.segments {
            match key.as_str() {
                NODE_KEY => {
                    let node = value.parse().map_err(|_| TopologyError::BadValue { key: NODE_KEY })?;
                    place.node = Some(node);
                }
                ZONE_KEY => place.zone = Some(value.parse()?),
                _ => return Err(TopologyError::UnknownKey { key: key.clone() }),
            }
        }
        if place.node.is_none() && place.zone.is_none() { Err(TopologyError::Nowhere) } else { Ok(place) }
    }

    /// Whether a node there is in this place.
    #[must_use]
    pub fn holds(&self, node: &NodeTopology) -> bool {
        self.node.as_ref().is_none_or(|name| *name == node.node)
            && self.zone.as_ref().is_none_or(|zone| Some(zone) == node.zone.as_ref())
    }
}

/// Where a new volume is to be reachable, best first, without repetition: what is preferred, then what else is possible.
/// Empty means that anywhere will do.
///
/// With WaitForFirstConsumer the first is the node of the pod.
///
/// # Errors
/// [`TopologyError`].
pub fn wanted_places(requirement: Option<&v1::TopologyRequirement>) -> Result<Vec<Place>, TopologyError> {
    let mut places: Vec<Place> = Vec::new();
    let Some(requirement) = requirement else { return Ok(places) };
    for topology in requirement.preferred.iter().chain(&requirement.requisite) {
        let place = Place::parse(topology)?;
        if !places.contains(&place) {
            places.push(place);
        }
    }
    Ok(places)
}

fn is_label_value(text: &str) -> bool {
    let alphanumeric = |byte: Option<u8>| byte.is_some_and(|byte| byte.is_ascii_alphanumeric());
    text.len() <= MAX_SEGMENT_BYTES
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.'))
        && alphanumeric(text.bytes().next())
        && alphanumeric(text.bytes().last())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use tonic::Code;

    fn node(name: &str, zone: Option<&str>) -> NodeTopology {
        NodeTopology::new(name.parse().unwrap(), zone.map(|zone| zone.parse().unwrap())).unwrap()
    }

    fn topology(segments: &[(&str, &str)]) -> v1::Topology {
        let segments = segments.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        v1::Topology { segments }
    }

    #[test]
    fn a_place_given_out_is_understood_when_it_comes_back() {
        for given in [node("n1", None), node("n1", Some("east"))] {
            let place = Place::parse(&given.to_wire()).unwrap();
            assert_eq!((place.node.as_ref(), place.zone.as_ref()), (Some(given.node()), given.zone()));
            assert!(place.holds(&given));
            assert!(!place.holds(&node("n2", Some("east"))));
        }
    }

    #[test]
    fn a_zone_holds_all_its_nodes_and_no_other() {
        let east = Place::parse(&topology(&[(ZONE_KEY, "east")])).unwrap();
        assert!(east.holds(&node("n1", Some("east"))) && east.holds(&node("n2", Some("east"))));
        assert!(!east.holds(&node("n1", Some("west"))) && !east.holds(&node("n1", None)));
    }

    #[test]
    fn the_preferred_place_comes_first_and_none_twice() {
        let [a, b, c] = ["a", "b", "c"].map(|name| node(name, None).to_wire());
        let requirement =
            v1::TopologyRequirement { requisite: vec![a.clone(), b.clone(), c.clone()], preferred: vec![b, c] };
        let places = wanted_places(Some(&requirement)).unwrap();
        let order: Vec<&str> = places.iter().map(|place| place.node.as_ref().unwrap().as_str()).collect();
        assert_eq!(order, ["b", "c", "a"]);
        assert!(wanted_places(None).unwrap().is_empty());
    }

    #[test]
    fn a_foreign_key_or_value_is_named_in_the_refusal() {
        for (segments, named) in [
            (vec![("topology.kubernetes.io/zone", "x")], "topology.kubernetes.io/zone"),
            (vec![(ZONE_KEY, "-x")], ZONE_KEY),
            (vec![(ZONE_KEY, "")], ZONE_KEY),
            (vec![(NODE_KEY, "N_1")], NODE_KEY),
            (vec![], NODE_KEY),
        ] {
            let status = Status::from(Place::parse(&topology(&segments)).unwrap_err());
            assert_eq!(status.code(), Code::InvalidArgument);
            assert!(status.message().contains(named), "{}", status.message());
        }
    }

    #[test]
    fn a_node_whose_name_no_label_can_hold_is_refused() {
        let name: NodeName = format!("{}.{}", "a".repeat(40), "b".repeat(40)).parse().unwrap();
        assert_eq!(NodeTopology::new(name, None), Err(TopologyError::BadValue { key: NODE_KEY }));
    }
}
