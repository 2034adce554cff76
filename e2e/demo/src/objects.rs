//! The few fields of Kubernetes objects that the demo looks at, read from `kubectl get -o json`.
//!
//! A view of its own rather than the crate of the CRDs: the demo is a stranger who sees only what the API shows.

use serde::Deserialize;

/// A list of objects.
#[derive(Debug, Clone, Deserialize)]
pub struct List<T> {
    /// Them.
    pub items: Vec<T>,
}

/// `metadata`.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Metadata {
    /// Its name.
    pub name: String,
    /// Which object of this name.
    #[serde(default)]
    pub uid: String,
    /// Set while it is being deleted.
    pub deletion_timestamp: Option<String>,
}

/// A `Volume` of Lamina.
#[derive(Debug, Clone, Deserialize)]
pub struct Volume {
    /// Name.
    pub metadata: Metadata,
    /// What the operator says.
    #[serde(default)]
    pub status: VolumeStatus,
}

/// Its status.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct VolumeStatus {
    /// CSI volume handle.
    pub volume_id: String,
    /// Configuration generation.
    pub generation: u64,
    /// Health in one word.
    pub state: String,
    /// The committed map.
    pub map: Option<Map>,
    /// The same for people.
    pub summary: VolumeSummary,
}

/// What `kubectl get volumes` prints.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct VolumeSummary {
    /// Such as 3/4.
    pub copies: String,
    /// Servers that hold it.
    pub r#where: String,
    /// What goes on.
    pub doing: String,
}

/// The committed map.
#[derive(Debug, Clone, Deserialize)]
pub struct Map {
    /// Top first.
    #[serde(default)]
    pub layers: Vec<Layer>,
    /// Where layers lie.
    pub placements: Vec<Placement>,
}

/// A sheet of pages.
#[derive(Debug, Clone, Deserialize)]
pub struct Layer {
    /// In bytes.
    pub size: u64,
}

/// The groups of a stripe.
#[derive(Debug, Clone, Deserialize)]
pub struct Placement {
    /// In order.
    pub groups: Vec<Group>,
}

/// The copies of a share of the stripe.
#[derive(Debug, Clone, Deserialize)]
pub struct Group {
    /// Them.
    pub members: Vec<Member>,
}

/// One copy.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Member {
    /// Its id.
    pub copy: String,
    /// Id of its server.
    pub server: String,
    /// Active, Syncing or Failed.
    pub state: String,
}

impl Volume {
    /// The copies on a server, with the number of their group.
    pub fn members_on<'a>(&'a self, server: &'a str) -> impl Iterator<Item = (usize, &'a Member)> {
        let placements = self.status.map.iter().flat_map(|map| &map.placements);
        let groups = placements.flat_map(|placement| placement.groups.iter().enumerate());
        groups
            .flat_map(|(number, group)| group.members.iter().map(move |member| (number, member)))
            .filter(move |(_, member)| member.server == server)
    }

    /// Whether every copy serves.
    #[must_use]
    pub fn is_healthy(&self) -> bool {
        self.status.state == "Healthy"
    }

    /// Generation, state and places in a line.
    #[must_use]
    pub fn in_short(&self) -> String {
        let VolumeStatus { generation, state, summary, .. } = &self.status;
        format!(
            "generation {generation}, {state}, copies {} on {} ({})",
            summary.copies, summary.r#where, summary.doing
        )
    }
}

/// A `StorageServer` of Lamina.
#[derive(Debug, Clone, Deserialize)]
pub struct StorageServer {
    /// Name, which is the node's.
    pub metadata: Metadata,
    /// How it is.
    #[serde(default)]
    pub status: ServerStatus,
}

/// Its status.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ServerStatus {
    /// Health in one word.
    pub state: String,
    /// Its id in maps.
    pub server_id: String,
}

/// A pod.
#[derive(Debug, Clone, Deserialize)]
pub struct Pod {
    /// Name.
    pub metadata: Metadata,
    /// Where it runs.
    pub spec: PodSpec,
    /// How it is.
    pub status: PodStatus,
}

/// Its spec.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodSpec {
    /// The node.
    #[serde(default)]
    pub node_name: String,
}

/// Its status.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodStatus {
    /// Its address.
    #[serde(rename = "podIP", default)]
    pub pod_ip: String,
    /// Its containers.
    #[serde(default)]
    pub container_statuses: Vec<ContainerStatus>,
}

/// A container.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ContainerStatus {
    /// `containerd://…`.
    #[serde(rename = "containerID", default)]
    pub container_id: String,
    /// Whether its probe says so.
    pub ready: bool,
    /// How often it was started again.
    pub restart_count: u32,
}

impl Pod {
    /// Whether all its containers are ready and nobody deletes it.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        let all = &self.status.container_statuses;
        self.metadata.deletion_timestamp.is_none() && !all.is_empty() && all.iter().all(|one| one.ready)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn volume() -> Volume {
        serde_json::from_value(serde_json::json!({
            "metadata": {"name": "v"},
            "status": {"volumeId": "0a", "generation": 7, "state": "Degraded",
                "summary": {"copies": "3/4", "where": "n1,n2! n3,n1", "doing": "serving"},
                "map": {"generation": 7, "placements": [{"groups": [
                    {"members": [{"copy": "c1", "server": "s1", "state": "Active", "ordinal": 0},
                                 {"copy": "c2", "server": "s2", "state": "Failed", "ordinal": 1}]},
                    {"members": [{"copy": "c3", "server": "s3", "state": "Active", "ordinal": 0},
                                 {"copy": "c4", "server": "s1", "state": "Active", "ordinal": 1}]},
                ]}]}},
        }))
        .unwrap()
    }

    #[test]
    fn copies_on_a_server_are_found_in_every_group() {
        let volume = volume();
        let found: Vec<_> = volume.members_on("s1").map(|(group, member)| (group, member.copy.as_str())).collect();
        assert_eq!(found, [(0, "c1"), (1, "c4")]);
        assert!(!volume.is_healthy());
    }

    #[test]
    fn an_object_without_status_reads_as_nothing_known() {
        let volume: Volume = serde_json::from_str(r#"{"metadata": {"name": "v"}}"#).unwrap();
        assert_eq!(volume.status.generation, 0);
        assert_eq!(volume.members_on("s1").count(), 0);
    }
}
