//! How a fake server answers a fence, lists suspect pages and marks what it is given (PROTOCOL.md §3.1, §5.9).

use super::*;

impl FakeServer {
    /// Its copies have so many pages left to fill.
    pub(in crate::management::tests) fn fill_but(&mut self, pages: u64) {
        self.copies.values_mut().for_each(|copy| copy.unsynced = pages);
    }

    pub(super) fn fence(&mut self, fence: Fence) -> ControlReply {
        self.fences.push(fence.clone());
        if self.copies.is_empty() {
            return ControlReply::NoCopy { copy: CopyId::NONE };
        }
        if self.closed {
            return ControlReply::DeviceClosed;
        }
        if fence.generation < self.promised || fence.generation <= self.stored() {
            return ControlReply::Refused { promised: self.promised, stored: self.stored() };
        }
        self.promised = fence.generation;
        for id in fence.unsync {
            let active = self
                .map
                .as_ref()
                .and_then(|map| map.place_of(id))
                .is_some_and(|(_, _, m)| m.state == MemberState::Active && m.boot == self.boot && self.is_newest);
            assert!(!active, "a copy that serves is never marked");
            if let Some(copy) = self.copies.get_mut(&id) {
                *copy = FakeCopy { unsynced: 100, listed: fence.generation, ..FakeCopy::default() };
            }
        }
        self.promise()
    }

    fn promise(&self) -> ControlReply {
        ControlReply::Promised(Promised {
            server: self.id,
            generation: self.promised,
            stored: self.stored(),
            sessions: self.sessions.clone(),
            copies: self.copies.iter().map(|(id, copy)| self.report(*id, copy)).collect(),
        })
    }

    /// The list has two pieces.
    pub(super) fn suspects(&mut self, generation: Generation, boot: BootId, from: u64) -> ControlReply {
        if self.promised != generation || self.stored() >= generation {
            self.refused_lists += 1;
            return ControlReply::Refused { promised: self.promised, stored: self.stored() };
        }
        if self.closed || self.boot != boot {
            return ControlReply::DeviceClosed;
        }
        if self.mute_lists {
            return ControlReply::NoSpace;
        }
        let bits = bytes::Bytes::from_static(&[3]);
        let next = if from == 0 { 50 } else { u64::MAX };
        ControlReply::Suspects(PageList { layer: LayerId(1), from, first: from, bits, next })
    }

    pub(super) fn rejoin(&mut self, rejoin: &Rejoin) -> ControlReply {
        self.rejoins.push(rejoin.clone());
        if self.promised != rejoin.generation || self.stored() >= rejoin.generation {
            return ControlReply::Refused { promised: self.promised, stored: self.stored() };
        }
        let member = self.map.as_ref().and_then(|map| map.place_of(rejoin.copy)).map(|(_, _, m)| *m);
        let active = member.is_some_and(|m| m.state == MemberState::Active && m.boot == self.boot && self.is_newest);
        assert!(!active, "a copy that serves is never marked");
        let promised = self.promised;
        let Some(copy) = self.copies.get_mut(&rejoin.copy) else { return ControlReply::NoCopy { copy: rejoin.copy } };
        if rejoin.list.from == 0 {
            *copy = FakeCopy::default();
        }
        copy.unsynced += rejoin.list.pages().count() as u64;
        if rejoin.list.next < u64::MAX {
            return ControlReply::Done;
        }
        copy.listed = promised;
        self.promise()
    }
}
