//! The settle (H12, R1): members of a group become equal on the suspect pages.
//!
//! Which pages are suspect each of the two copies says for itself (`missed`, PROTOCOL.md §5.3). An `Active` member makes each as
//! the authoritative copy's; a `Syncing` one marks it unsynced again (H7) and is filled. Which settle is done is known
//! in memory only and named by (authoritative copy, its boot id, generation that began it) (M3).

use super::StorageServer;
use super::compare::Needs;
use super::handles::ReplyTo;
use super::page_ops::{Exec, Work};
use super::requests::Located;
use crate::ids::{BootId, CopyId, LayerId, ServerId, VolumeId};
use crate::layer::{BLOCK_BYTES, PageKey};
use crate::wire::{Place, ReplyBody};
use bytes::Bytes;
use std::collections::BTreeSet;

impl StorageServer {
    /// The authoritative copy's side: which pages are suspect by what it knows itself.
    pub(super) fn serve_suspects(
        &mut self,
        to: ReplyTo,
        volume: VolumeId,
        peer: ServerId,
        (layer, group): (LayerId, u32),
    ) {
        let place = Place { layer, group, page: 0, offset: 0, length: BLOCK_BYTES };
        match self.locate(volume, &place, Needs::Active) {
            Err(Located::Nonsense) => self.violation(to.conn, super::Violation::Place),
            Err(Located::Reply(reply)) => self.answer(to.conn, &to.header, BootId::NONE, reply, Bytes::new()),
            Ok((boot, key, _)) => {
                let pages = self.pages_of(volume, key.copy, layer);
                let known = self.known(volume);
                let map = known.map.as_ref().expect("located");
                let (placement, _, _) = map.place_of(key.copy).expect("located");
                let Some(towards) = map.member_on(placement, group, peer).map(|m| m.ordinal) else {
                    return self.answer(to.conn, &to.header, BootId::NONE, ReplyBody::NoCopy, Bytes::new());
                };
                let own = known.layer_mut(&key).expect("located");
                let pages = own.suspects_to_settle(towards, pages).into_iter().collect();
                self.answer(to.conn, &to.header, boot, ReplyBody::Pages { pages }, Bytes::new());
            }
        }
    }

    /// The list has come: joined with the own one it is what is to settle.
    pub(super) fn listed(&mut self, copy: CopyId, pages: Vec<u64>) {
        let Some(pull) = self.pulls.get(&copy) else { return };
        let (volume, layer) = (pull.volume, pull.layer);
        let limit = self.pages_of(volume, copy, layer);
        let known = &self.volumes[&volume];
        let Some(map) = known.map.as_ref() else { return };
        let name = super::report::settle_in(map, copy);
        let source = name.and_then(|name| map.place_of(name.authoritative)).map(|(_, _, source)| source.ordinal);
        let own = known.copies.get(&copy).and_then(|c| c.layers.get(&layer));
        let (Some(towards), Some(own)) = (source, own) else { return };
        let mut all: BTreeSet<u64> = pages.into_iter().filter(|page| *page < limit).collect();
        all.append(&mut own.suspects_to_settle(towards, limit));
        self.begin_settling(copy, all);
    }

    /// On a `Syncing` member to settle a page is to mark it unsynced again.
    pub(super) fn mark_suspects(&mut self, copy: CopyId) {
        let Some((volume, layer, pages)) = self.pages_to_mark(copy) else { return };
        let Some(held) = self.known(volume).copies.get(&copy) else { return };
        let (Some(boot), page_bytes) = (held.boot, held.layers[&layer].page_bytes) else { return };
        for page in pages {
            let key = PageKey { copy, layer, page };
            let blocks = 0..page_bytes / BLOCK_BYTES;
            self.begin(Exec::new(volume, boot, key, blocks, Work::Unsync));
        }
    }

    /// The mark is durable.
    pub(super) fn page_unsynced(&mut self, page: PageKey) {
        let Some(volume) = self.volume_of(page.copy) else { return };
        if let Some(layer) = self.known(volume).layer_mut(&page) {
            layer.unsynced.insert(page.page);
        }
        self.page_marked(page.copy, page.page);
    }
}
