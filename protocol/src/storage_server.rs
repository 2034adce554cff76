//! The storage server's state machine: the comparator, the page logic, fills and settles (seed 002 \[0028\], \[0040\]).
//!
//! One [`StorageServer`] is one process with its devices. It holds no socket, no disk and no clock: see [`Input`] and
//! [`Output`]. Absent on purpose: any decision about who is `Active`, any deletion of its own accord, any answer out of
//! what another process of this server promised.
//!
//! | file | what |
//! |---|---|
//! | `compare` | the comparator's table, a pure function |
//! | `handles` | `Hello`, `Open`, `Join`, windows, credits |
//! | `requests` | from a frame to an execution |
//! | `page_ops` | executions: order within a page, marks before data, reads, writes, discards |
//! | `pending` | pending marks and `confirmed` |
//! | `missed` | what other members lack, and which pages are suspect |
//! | `reconfigure` | promise, fence, serve, copies |
//! | `report` | heartbeats, inventory, what a fence reply says |
//! | `pull`, `fill`, `settle` | pages from peers |
//! | `reserve` | slots for pages, or ENOSPC |
//! | `survey` | which pages were ever written |
//! | `volume` | what is known of a volume, and what of it is durable |

// A refusal is a reply that is moved once, off the hot path; boxing it would only hide that it is a value.
#![allow(clippy::result_large_err, clippy::large_enum_variant)]

use crate::ids::{BootId, ClusterId, CopyId, DeviceId, ServerId, SessionId, VolumeId};
use crate::layer::PageKey;
use crate::time::Millis;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

mod compare;
mod contract;
mod fill;
mod handles;
mod map_step;
pub mod medium;
mod mend;
mod missed;
mod page_ops;
mod pending;
mod pull;
mod reach;
mod reconfigure;
mod report;
mod requests;
mod reserve;
mod settle;
mod survey;
mod volume;

#[cfg(test)]
mod tests;

pub use contract::{CallId, ConnId, Input, Output, PeerId, Rot, StaleSeen, Violation};
pub use report::CopyStanding;
pub use volume::{VolumeBlob, read_blob};

use handles::{Conn, Handle, OpenId, WaitingOpen};
use medium::{MediumAnswer, MediumEvent, MediumOp, OpId, Opened, PageRecord};
use missed::Missed;
use page_ops::{Exec, ExecId, PageQueue};
use pull::Pull;
use volume::Volume;

/// Who a server is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Its id, from its devices.
    pub server: ServerId,
    /// Its cluster.
    pub cluster: ClusterId,
}

/// Records of pages kept in memory per device, at most; the store has its own cache behind this.
const MAX_CACHED_RECORDS: usize = 4096;

/// One storage server.
#[derive(Debug)]
pub struct StorageServer {
    config: Config,
    devices: BTreeMap<BootId, Device>,
    volumes: BTreeMap<VolumeId, Volume>,
    conns: BTreeMap<ConnId, Conn>,
    handles: BTreeMap<crate::wire::HandleId, Handle>,
    opens: Vec<WaitingOpen>,
    execs: BTreeMap<ExecId, Exec>,
    ops: BTreeMap<OpId, (BootId, Owner)>,
    pulls: BTreeMap<CopyId, Pull>,
    /// Servers that a leader asks about.
    tries: BTreeMap<PeerId, reach::Try>,
    /// Copies whose deletion was ordered lately: none of them is made again (R14).
    deleted: VecDeque<CopyId>,
    minted: u64,
    lease_number: u64,
    leaving: bool,
    now: Millis,
    timers: BTreeSet<(Millis, Due)>,
    wake: Millis,
    out: Vec<Output>,
}

/// An open device.
#[derive(Debug)]
struct Device {
    device: DeviceId,
    capacity_bytes: u64,
    free_bytes: u64,
    /// What was last refused for want of room (R8).
    lacked_bytes: u64,
    records: BTreeMap<PageKey, PageRecord>,
    evicted: Option<PageKey>,
    pages: BTreeMap<PageKey, PageQueue>,
    /// Pages whose slots are there because these sessions asked, and not written since (R8); no more than it has slots.
    reserved: BTreeMap<PageKey, BTreeSet<SessionId>>,
}

/// What a timer is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Due {
    /// Pending marks that `confirmed` covers are cleared, batched.
    Clear(VolumeId),
    /// Ask again for a map that others have.
    Behind(VolumeId),
    /// Begin fills, settles and repairs that a map calls for, or try them again.
    Pulls(VolumeId),
    /// A fill that keeps its pace goes on.
    Fill(CopyId),
    /// A try to reach a server is over.
    Reach(PeerId),
}

/// Who waits for the answer of a medium operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Owner {
    /// The record of a page, for everything queued on it.
    Load(VolumeId, PageKey),
    /// The durable marks of a page: whether pending is among them, and the ordinals that it is missed by.
    Mark(VolumeId, PageKey, bool, u16),
    /// Marks that go: nobody waits, but a fence does.
    Clear(VolumeId),
    /// Part of an execution; the number is the first block that it is about.
    Exec(ExecId, u32),
    /// The next page after the one that a source serves.
    ExecNext(ExecId),
    /// A client's flush.
    Flush(ExecId),
    /// A step of the reconfiguration under way.
    Change(VolumeId),
    /// The incarnation that an `Open` waits for.
    Open(OpenId),
    /// A stale mark on a bad block: nobody waits, but a fence does.
    Bad(VolumeId),
    /// The next own page of a fill.
    PullNext(CopyId, PeerId),
    /// What a fill or settle brought becomes durable: first the data, then the marks.
    PullFlush(CopyId, PeerId),
    /// See above.
    PullMarks(CopyId, PeerId),
    /// Nobody.
    Nobody,
}

impl StorageServer {
    /// A server without devices.
    pub fn new(config: Config) -> Self {
        Self {
            config,
            devices: BTreeMap::new(),
            volumes: BTreeMap::new(),
            conns: BTreeMap::new(),
            handles: BTreeMap::new(),
            opens: Vec::new(),
            execs: BTreeMap::new(),
            ops: BTreeMap::new(),
            pulls: BTreeMap::new(),
            tries: BTreeMap::new(),
            deleted: VecDeque::new(),
            minted: 0,
            lease_number: 0,
            leaving: false,
            now: Millis::default(),
            timers: BTreeSet::new(),
            wake: Millis::NEVER,
            out: Vec::new(),
        }
    }

    /// Takes one input and appends what is to be done.
    pub fn handle(&mut self, now: Millis, input: Input, out: &mut Vec<Output>) {
        self.now = self.now.max(now);
        match input {
            Input::DeviceOpened(opened) => self.device_opened(opened),
            Input::Device { boot, event } => self.device_event(boot, event),
            Input::Frame { conn, frame } => self.frame(conn, frame),
            Input::Closed { conn } => self.conn_closed(conn),
            Input::Control { call, request } => self.control(call, request),
            Input::PeerConnected { peer } => self.peer_connected(peer),
            Input::PeerBroken { peer } => self.peer_broken(peer),
            Input::PeerFrame { peer, frame } => self.peer_frame(peer, frame),
            Input::Leave => self.leaving = true,
            Input::Timer => {}
        }
        self.run_due();
        out.append(&mut self.out);
    }

    /// Does what is due, and sets the one timer when its time has changed.
    fn run_due(&mut self) {
        while let Some(&(at, due)) = self.timers.first().filter(|(at, _)| *at <= self.now) {
            self.timers.remove(&(at, due));
            match due {
                Due::Clear(volume) => self.clear_due(volume),
                Due::Behind(volume) => self.behind_due(volume),
                Due::Pulls(volume) => self.start_pulls(volume),
                Due::Fill(copy) => self.fill_due(copy),
                Due::Reach(peer) => drop(self.tried(peer, false)),
            }
        }
        let next = self.timers.first().map_or(Millis::NEVER, |(at, _)| *at);
        if next != self.wake {
            self.wake = next;
            self.out.push(Output::WakeAt(next));
        }
    }

    fn due(&mut self, at: Millis, what: Due) {
        self.timers.insert((at, what));
    }

    fn mint(&mut self) -> u64 {
        self.minted += 1;
        self.minted
    }

    fn medium(&mut self, boot: BootId, owner: Owner, what: MediumOp) {
        let op = self.mint();
        self.ops.insert(op, (boot, owner));
        self.out.push(Output::Medium { boot, op, what });
    }

    fn device_opened(&mut self, opened: Opened) {
        assert!(
            opened.server == self.config.server && opened.cluster == self.config.cluster,
            "another server's device"
        );
        assert!(!self.devices.contains_key(&opened.boot), "a boot id is minted once (R3)");
        self.lease_number = self.lease_number.max(opened.lease_number);
        for (volume, blob) in &opened.volumes {
            self.volumes.entry(*volume).or_default().merge_blob(blob);
        }
        for record in &opened.copies {
            self.volumes.entry(record.volume).or_default().add_copy(record.clone(), opened.boot, opened.device);
        }
        self.restore_flags(&opened);
        let device = Device {
            device: opened.device,
            capacity_bytes: opened.capacity_bytes,
            free_bytes: opened.free_bytes,
            lacked_bytes: 0,
            records: BTreeMap::new(),
            evicted: None,
            pages: BTreeMap::new(),
            reserved: BTreeMap::new(),
        };
        self.devices.insert(opened.boot, device);
    }

    fn restore_flags(&mut self, opened: &Opened) {
        let owner: BTreeMap<CopyId, VolumeId> = opened.copies.iter().map(|c| (c.copy, c.volume)).collect();
        for page in &opened.pending {
            if let Some(layer) = owner.get(&page.copy).and_then(|v| self.volumes.get_mut(v)?.layer_mut(page)) {
                layer.pending_from_disk(page.page);
            }
        }
        for (page, mask) in &opened.missed {
            if let Some(layer) = owner.get(&page.copy).and_then(|v| self.volumes.get_mut(v)?.layer_mut(page)) {
                layer.missed.insert(page.page, Missed::from_disk(*mask));
            }
        }
        for page in &opened.unsynced {
            if let Some(layer) = owner.get(&page.copy).and_then(|v| self.volumes.get_mut(v)?.layer_mut(page)) {
                layer.unsynced.insert(page.page);
            }
        }
    }

    fn device_event(&mut self, boot: BootId, event: MediumEvent) {
        match event {
            MediumEvent::Failed => self.device_failed(boot),
            MediumEvent::Grown { capacity_bytes, free_bytes } => {
                let Some(device) = self.devices.get_mut(&boot) else { return };
                (device.capacity_bytes, device.free_bytes) = (capacity_bytes, free_bytes);
            }
            MediumEvent::Answered { op, answer, free_bytes } => {
                let Some(device) = self.devices.get_mut(&boot) else { return };
                device.free_bytes = free_bytes;
                let (opened, owner) = self.ops.remove(&op).expect("a device answers each operation once");
                assert_eq!(opened, boot, "an operation is answered by the device that has it");
                self.answered(boot, owner, answer);
            }
        }
    }

    fn answered(&mut self, boot: BootId, owner: Owner, answer: MediumAnswer) {
        match owner {
            Owner::Load(volume, page) => self.loaded(boot, volume, page, answer),
            Owner::Mark(volume, page, ..) if answer == MediumAnswer::NoSpace => {
                self.refuse_unmarked(boot, volume, page)
            }
            Owner::Mark(volume, page, pending, missed) => self.marked(boot, volume, page, (pending, missed)),
            Owner::Clear(volume) | Owner::Bad(volume) => self.finished_one(volume),
            Owner::Exec(exec, block) => self.exec_answered(exec, block, answer),
            Owner::ExecNext(exec) => self.exec_next(exec, answer),
            Owner::Flush(exec) => self.flush_answered(exec),
            Owner::Change(volume) => self.change_answered(volume, answer),
            Owner::Open(open) => self.open_durable(open),
            Owner::PullNext(copy, peer) => self.pull_next(copy, peer, answer),
            Owner::PullFlush(copy, peer) => self.pull_flushed(copy, peer),
            Owner::PullMarks(copy, peer) => self.pull_marked(copy, peer),
            Owner::Nobody => {}
        }
    }

    /// R3: the opening is over. Whatever waited for it is answered `NotServing`, never success.
    fn device_failed(&mut self, boot: BootId) {
        if self.devices.remove(&boot).is_none() {
            return;
        }
        self.out.push(Output::CloseDevice { boot });
        let lost: Vec<_> = self.ops.iter().filter(|(_, (b, _))| *b == boot).map(|(op, (_, o))| (*op, *o)).collect();
        for (op, _) in &lost {
            self.ops.remove(op);
        }
        // Closed first: what goes on below must hand nothing more to this device, for nothing would answer.
        let closed = self.volumes.values_mut().flat_map(|v| v.copies.values_mut()).filter(|c| c.boot == Some(boot));
        let close = |copy: &mut volume::Copy| {
            copy.close();
            copy.record.copy
        };
        let copies: Vec<CopyId> = closed.map(close).collect();
        for copy in copies {
            self.drop_pull(copy);
        }
        let execs: Vec<_> = self.execs.iter().filter(|(_, e)| e.uses(boot)).map(|(id, _)| *id).collect();
        for exec in execs {
            self.abandon(exec);
        }
        for (_, owner) in lost {
            match owner {
                Owner::Clear(volume) | Owner::Bad(volume) => self.finished_one(volume),
                Owner::PullFlush(copy, _) | Owner::PullMarks(copy, _) => self.pull_lost(copy),
                Owner::Open(open) => self.open_lost(open),
                Owner::Change(volume) => self.change_lost(volume),
                _ => {}
            }
        }
    }

    /// One piece of work of a volume is over that a fence waits for.
    fn finished_one(&mut self, volume: VolumeId) {
        if let Some(known) = self.volumes.get_mut(&volume) {
            known.executing = known.executing.checked_sub(1).expect("counted when it began");
        }
        self.advance_change(volume);
    }
}

/// A queue that holds what comes in order.
type Line<T> = VecDeque<T>;
