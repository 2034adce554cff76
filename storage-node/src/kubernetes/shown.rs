//! What the object's status says, and when it is worth writing: pure functions.

use super::Own;
use crate::devices::{DeviceState, DeviceView};
use crate::health::Snapshot;
use crate::store::Stats;
use lamina_crds::storage_server::{DeviceState as Shown, DeviceStatus, ServerAddresses, StorageServerStatus};
use lamina_crds::{Id, StorageServer};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// A change of the space smaller than this part of all waits.
const STEP: i64 = 100;
/// How long it waits.
const WAIT: Duration = Duration::from_secs(60);

/// The fields of this program.
pub(super) fn status(own: &Own, now: &Snapshot) -> StorageServerStatus {
    let devices: Vec<_> = now.devices.iter().map(|(view, stats)| device(view, stats.as_ref(), now)).collect();
    let sum = |of: fn(&DeviceStatus) -> Option<i64>| devices.iter().filter_map(of).sum();
    StorageServerStatus {
        server_id: (!now.server.is_none()).then(|| Id::of(now.server.0)),
        cluster_id: Some(Id::of(own.cluster.0)),
        addresses: Some(ServerAddresses { data: own.data.clone(), control: own.control.clone() }),
        version: Some(env!("CARGO_PKG_VERSION").to_owned()),
        capacity_bytes: Some(sum(|d| d.capacity_bytes)),
        used_bytes: Some(sum(|d| d.used_bytes)),
        devices,
        ..StorageServerStatus::default()
    }
}

fn device(view: &DeviceView, stats: Option<&Stats>, now: &Snapshot) -> DeviceStatus {
    let copies = now.copies.iter().filter(|copy| Some(copy.device) == view.id).count();
    let mut reason = view.reason.clone();
    if let Some(reason) = &mut reason {
        reason.truncate(reason.floor_char_boundary(1024));
    }
    DeviceStatus {
        path: view.path.display().to_string(),
        state: match view.state {
            DeviceState::Opening => Shown::Opening,
            DeviceState::Ready => Shown::Ready,
            DeviceState::Refused => Shown::Refused,
            DeviceState::Missing => Shown::Missing,
            DeviceState::Failed => Shown::Failed,
            DeviceState::Unlisted => Shown::Unlisted,
        },
        reason,
        id: view.id.map(|id| Id::of(id.0)),
        boot: view.boot.map(|boot| Id::of(boot.0)),
        capacity_bytes: stats.map(|s| s.capacity_bytes as i64),
        used_bytes: stats.map(|s| s.capacity_bytes.saturating_sub(s.free_bytes) as i64),
        reserved_bytes: None,
        copies: view.id.map(|_| copies as i64),
        errors: Some(view.failures as i64),
        in_place: stats.map(|s| s.in_place),
    }
}

/// The patch for server-side apply: nothing but these fields.
pub(super) fn patch(node: &str, status: &StorageServerStatus) -> Value {
    use kube::Resource;
    json!({
        "apiVersion": StorageServer::api_version(&()),
        "kind": StorageServer::kind(&()),
        "metadata": {"name": node},
        "status": status,
    })
}

/// What was written last, and when.
#[derive(Default)]
pub(super) struct Last(Option<(StorageServerStatus, Instant)>);

impl Last {
    pub(super) fn written(&mut self, status: StorageServerStatus) {
        self.0 = Some((status, Instant::now()));
    }

    /// Transitions at once, space by steps or after a while.
    pub(super) fn is_worth_writing(&self, next: &StorageServerStatus) -> bool {
        let Some((last, at)) = &self.0 else { return true };
        if without_space(last) != without_space(next) {
            return true;
        }
        let step = last.capacity_bytes.unwrap_or(0) / STEP;
        let moved = (last.used_bytes.unwrap_or(0) - next.used_bytes.unwrap_or(0)).abs();
        moved > 0 && (moved >= step || at.elapsed() >= WAIT)
    }
}

fn without_space(status: &StorageServerStatus) -> StorageServerStatus {
    let mut status = status.clone();
    status.used_bytes = None;
    status.devices.iter_mut().for_each(|device| device.used_bytes = None);
    status
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use lamina_protocol::ids::{BootId, ClusterId, DeviceId, ServerId};

    fn own() -> Own {
        let data = vec!["10.0.0.1:4700".into()];
        Own { node: "n1".into(), cluster: ClusterId(1), data, control: vec!["10.0.0.1:4701".into()] }
    }

    fn snapshot(state: DeviceState, free_bytes: u64) -> Snapshot {
        let view = DeviceView {
            path: "/dev/a".into(),
            state,
            reason: None,
            id: Some(DeviceId(3)),
            boot: Some(BootId(4)),
            failures: 0,
        };
        let stats = Stats { capacity_bytes: 1000, free_bytes, ..Stats::default() };
        Snapshot {
            cluster: ClusterId(1),
            server: ServerId(2),
            devices: vec![(view, Some(stats))],
            copies: vec![],
            connections: 0,
            heard_leader: true,
        }
    }

    #[test]
    fn transitions_are_written_at_once_and_space_at_steps() {
        let first = status(&own(), &snapshot(DeviceState::Ready, 900));
        let mut last = Last::default();
        assert!(last.is_worth_writing(&first));
        last.written(first.clone());
        assert!(!last.is_worth_writing(&first));
        assert!(!last.is_worth_writing(&status(&own(), &snapshot(DeviceState::Ready, 891))));
        assert!(last.is_worth_writing(&status(&own(), &snapshot(DeviceState::Ready, 890))));
        assert!(last.is_worth_writing(&status(&own(), &snapshot(DeviceState::Failed, 900))));
    }

    #[test]
    fn only_fields_of_this_program_are_applied() {
        let patch = patch("n1", &status(&own(), &snapshot(DeviceState::Ready, 900)));
        let fields: Vec<_> = patch["status"].as_object().unwrap().keys().map(String::as_str).collect();
        let mut expected =
            ["addresses", "capacityBytes", "clusterId", "devices", "serverId", "usedBytes", "version"].to_vec();
        expected.sort_unstable();
        assert_eq!(fields, expected);
    }
}
