//! The read lease (R5, M7).
//!
//! Invariant: a read is handed over only while every `Active` member of each group that it touched has served something
//! at this generation for a request that was *sent* within the last [`READ_LEASE_MS`]; a late reply renews nothing. After
//! idleness the driver asks first: the pings go out beside the read, so an idle volume costs nothing.

use super::Driver;
use super::op::OpId;
use super::peer::{Outgoing, What};
use super::view::{Route, View};
use crate::ids::{Seq, ServerId};
use crate::limits::READ_LEASE_MS;
use crate::mutants::{Mutant, on};
use crate::wire::RequestBody;
use bytes::Bytes;

/// A word older than this is renewed beside a read, so that steady reading never waits for a ping.
const RENEW_AFTER_MS: u64 = READ_LEASE_MS / 2;

impl Driver {
    /// Whether a read that touched these groups may be handed over now.
    pub(super) fn lease_holds(&self, view: &View, groups: u16) -> bool {
        let (generation, now) = (view.generation(), self.now);
        let leased = |server: &ServerId| self.peers[server].leased(generation, now) || on(Mutant::LeaseIgnored);
        view.groups(groups).flat_map(|route| &route.readers).all(leased)
    }

    /// Beside a read: ping the other `Active` members of the group whose word grows old.
    pub(super) fn renew_leases(&mut self, route: &Route) {
        let (generation, now) = (self.generation(), self.now);
        for &server in &route.readers {
            let peer = &self.peers[&server];
            let fresh = peer.served_ago(generation, now).is_some_and(|ms| ms < RENEW_AFTER_MS);
            // Whatever went out to it at this generation lately will say the same as a ping.
            let asked = |sent: &super::peer::Sent| {
                sent.generation == generation && now.since(sent.at) < RENEW_AFTER_MS && sent.what.is_served_alike()
            };
            let on_its_way = peer.pinging || peer.under_way.values().next_back().is_some_and(asked);
            if !fresh && !on_its_way {
                self.ping(server);
            }
        }
    }

    /// Data waits: ping every member whose word is missing.
    pub(super) fn ask_for_lease(&mut self, view: &View, groups: u16) {
        let (generation, now) = (view.generation(), self.now);
        for &server in view.groups(groups).flat_map(|route| &route.readers) {
            let peer = &self.peers[&server];
            if !peer.leased(generation, now) && !peer.pinging {
                self.ping(server);
            }
        }
    }

    fn ping(&mut self, server: ServerId) {
        let generation = self.generation();
        let peer = self.peers.get_mut(&server).expect("every serving server of the map has a peer");
        if peer.ping_refused_at == generation {
            return;
        }
        peer.pinging = true;
        let outgoing = Outgoing { what: What::Ping, body: RequestBody::Ping, payload: Bytes::new(), seq: Seq(0) };
        self.transmit(server, outgoing);
    }

    /// A member has renewed its word, or can be asked again.
    pub(super) fn recheck_leases(&mut self) {
        if self.awaiting_lease.is_empty() {
            return;
        }
        let waiting: Vec<OpId> = self.awaiting_lease.iter().copied().collect();
        for id in waiting {
            self.awaiting_lease.remove(&id);
            self.hand_over(id);
        }
    }
}
