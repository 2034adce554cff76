//! What is not counted but looked at: copies and devices, at each scrape.

use crate::health::Snapshot;
use lamina_protocol::map::MemberState;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CopyLabels {
    volume: String,
    copy: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StateLabels {
    volume: String,
    copy: String,
    state: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DeviceLabels {
    path: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DeviceStateLabels {
    path: String,
    state: String,
}

type OfCopies = Family<CopyLabels, Gauge>;
type OfDevices = Family<DeviceLabels, Gauge>;

#[derive(Clone, Default)]
pub(super) struct Gauges {
    ready: Gauge,
    copy_state: Family<StateLabels, Gauge>,
    copy_unsynced: OfCopies,
    copy_pages: OfCopies,
    copy_filled: OfCopies,
    device_state: Family<DeviceStateLabels, Gauge>,
    device_failures: OfDevices,
    device_capacity: OfDevices,
    device_free: OfDevices,
    device_bad_blocks: OfDevices,
    device_journal: OfDevices,
    device_in_place: OfDevices,
    device_syncs: OfDevices,
    device_write_bytes: OfDevices,
    device_read_bytes: OfDevices,
}

impl Gauges {
    pub(super) fn register(&self, r: &mut Registry) {
        r.register("ready", "1 = the leader has spoken and every copy serves", self.ready.clone());
        r.register("copy_state", "1 = the stored map says so of the copy", self.copy_state.clone());
        r.register("copy_unsynced_pages", "Pages that a fill must still bring", self.copy_unsynced.clone());
        r.register("copy_pages", "Pages of the copy's share", self.copy_pages.clone());
        r.register_with_unit("copy_filled", "Filled since it is Syncing", Unit::Bytes, self.copy_filled.clone());
        r.register("device_state", "1 = the device is in this state", self.device_state.clone());
        r.register("device_failures", "Openings that ended with an error", self.device_failures.clone());
        r.register_with_unit("device_capacity", "Room for pages", Unit::Bytes, self.device_capacity.clone());
        r.register_with_unit("device_free", "Room in free slabs", Unit::Bytes, self.device_free.clone());
        r.register("device_bad_blocks", "Blocks answered as bad", self.device_bad_blocks.clone());
        r.register_with_unit("device_journal_used", "Journal in use", Unit::Bytes, self.device_journal.clone());
        r.register("device_in_place", "1 = data is written in place", self.device_in_place.clone());
        r.register("device_syncs", "Calls of fdatasync since it was opened", self.device_syncs.clone());
        let written = self.device_write_bytes.clone();
        r.register_with_unit("device_written", "Data written since it was opened", Unit::Bytes, written);
        r.register_with_unit(
            "device_read",
            "Data read since it was opened",
            Unit::Bytes,
            self.device_read_bytes.clone(),
        );
    }

    /// Brings everything up to date; what is gone is shown no more.
    pub(super) fn show(&self, shown: &Snapshot) {
        self.ready.set(i64::from(shown.ready()));
        self.show_copies(shown);
        self.show_devices(shown);
    }

    fn show_copies(&self, shown: &Snapshot) {
        self.copy_state.clear();
        [&self.copy_unsynced, &self.copy_pages, &self.copy_filled].iter().for_each(|family| family.clear());
        for copy in &shown.copies {
            let (volume, name) = (copy.volume.to_string(), copy.copy.to_string());
            let state = match (copy.boot, copy.member.map(|m| m.state)) {
                (None, _) => "closed",
                (_, None) => "unnamed",
                (_, Some(MemberState::Active)) => "active",
                (_, Some(MemberState::Syncing)) => "syncing",
                (_, Some(MemberState::Failed)) => "failed",
            };
            let labels = StateLabels { volume: volume.clone(), copy: name.clone(), state };
            self.copy_state.get_or_create(&labels).set(1);
            let labels = CopyLabels { volume, copy: name };
            self.copy_unsynced.get_or_create(&labels).set(copy.unsynced.0 as i64);
            self.copy_pages.get_or_create(&labels).set(copy.unsynced.1 as i64);
            self.copy_filled.get_or_create(&labels).set(copy.filled_bytes as i64);
        }
    }

    fn show_devices(&self, shown: &Snapshot) {
        self.device_state.clear();
        let of_stats = [
            &self.device_capacity,
            &self.device_free,
            &self.device_bad_blocks,
            &self.device_journal,
            &self.device_in_place,
            &self.device_syncs,
            &self.device_write_bytes,
            &self.device_read_bytes,
        ];
        of_stats.iter().for_each(|family| family.clear());
        self.device_failures.clear();
        for (view, stats) in &shown.devices {
            let path = view.path.display().to_string();
            let state = format!("{:?}", view.state).to_lowercase();
            self.device_state.get_or_create(&DeviceStateLabels { path: path.clone(), state }).set(1);
            let labels = DeviceLabels { path };
            self.device_failures.get_or_create(&labels).set(view.failures as i64);
            let Some(s) = stats else { continue };
            let values = [
                s.capacity_bytes,
                s.free_bytes,
                s.bad_blocks,
                s.journal_used_bytes,
                s.in_place.into(),
                s.syncs,
                s.write_bytes,
                s.read_bytes,
            ];
            for (family, value) in of_stats.iter().zip(values) {
                family.get_or_create(&labels).set(value as i64);
            }
        }
    }
}
