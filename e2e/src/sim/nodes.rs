//! What csi-node does beside attaching: it replaces a session that is over (R10), and asks whether a volume is blank before
//! it makes a filesystem (PROTOCOL.md §2.9); with the oracles of both.

use super::clients::Attachment;
use super::world::World;
use lamina_protocol::map::{Session, VolumeMap};

impl World {
    /// ReplaceSession (R10): in one step the wish of this node is for another session, in the place of the one that is
    /// over.
    pub(super) fn replace_session(&mut self, client: usize) {
        let Some(old) = self.clients[client].attached.as_ref().map(|a| a.id) else { return };
        self.counters.count("reached: a session was replaced in one step");
        self.unstage(client);
        let id = self.wish_instead(client, old);
        self.clients[client].attached =
            Some(Attachment { id, wished: true, staged: false, lost: false, dead: false, draining: false });
    }

    /// R10: no map lists two sessions of one node, and none takes one in while the map before lists another of its node.
    pub(super) fn check_nodes(&mut self, before: Option<&VolumeMap>, map: &VolumeMap) {
        let new = |s: &&Session| before.is_some_and(|old| old.session(s.id).is_none());
        let beside = |s: &Session| before.is_some_and(|old| old.sessions.iter().any(|o| o.node == s.node));
        let twice = |s: &Session| map.sessions.iter().filter(|o| o.node == s.node).count() > 1;
        let bad = map.sessions.iter().find(|s| twice(s)).or(map.sessions.iter().filter(new).find(|s| beside(s)));
        if let Some(session) = bad {
            self.fail("R10", format!("{session:?} comes beside another session of its node"));
        }
    }

    /// Blank (PROTOCOL.md §2.9): what is called blank never held anything that anybody was told of.
    pub(super) fn found_blank(&mut self, tag: u64, address: &[u8]) {
        let address = <[u8; 8]>::try_from(address).ok().map(u64::from_le_bytes);
        self.counters.count(match address {
            None => "reached: a volume is found blank",
            Some(_) => "reached: a volume is found written",
        });
        let page = u64::from(self.plan.setup.page_bytes) / 4096;
        let blocks = address.map(|at| at / 4096 / page * page..at / 4096 / page * page + page);
        let verdict = self.register.blank(tag, blocks);
        self.judge(verdict);
    }
}
