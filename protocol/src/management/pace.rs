//! The pace of fills: servers that fill copies of a volume are told what its policy lets them take.
//!
//! Invariant: a server with a `Syncing` member is told before it is handed the map, once for each generation and whenever
//! the policy changes; nothing is decided by it.

use super::serve::AGAIN_MS;
use super::volume::{Volume, What, World};
use crate::control::{ControlReply, ControlRequest, FillLimit};
use crate::ids::{Generation, ServerId};
use crate::map::{MemberState, VolumeMap};
use crate::time::Millis;
use std::collections::BTreeSet;

/// What a server was told.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pace {
    generation: Generation,
    limit: FillLimit,
    asked: Millis,
    done: bool,
}

impl Volume {
    /// Tells every server that fills a copy its pace, if it was not told yet.
    pub(super) fn limit_fills(&mut self, world: &mut World<'_>) {
        let (volume, generation) = (self.id(), self.status().generation);
        let limit = self.policy().map(|policy| policy.fill_limit).unwrap_or_default();
        let syncing = self.map().into_iter().flat_map(VolumeMap::members).filter(|m| m.state == MemberState::Syncing);
        let servers: BTreeSet<_> = syncing.map(|m| m.server).collect();
        self.paces.retain(|id, _| servers.contains(id));
        for id in servers {
            let told = self.paces.get(&id).filter(|p| (p.generation, p.limit) == (generation, limit));
            let waits = told.is_some_and(|p| p.done || world.now.since(p.asked) < AGAIN_MS);
            if waits || !world.servers.is_alive(id) {
                continue;
            }
            self.paces.insert(id, Pace { generation, limit, asked: world.now, done: false });
            world.ask(id, volume, What::Limit, ControlRequest::LimitFills { volume, limit });
            world.wake_at(world.now.after(AGAIN_MS));
        }
    }

    pub(super) fn limit_answered(&mut self, server: ServerId, reply: Option<ControlReply>) {
        if let (Some(pace), Some(ControlReply::Done)) = (self.paces.get_mut(&server), reply) {
            pace.done = true;
        }
    }
}
