//! The settle (H12, R1): members of a group become equal on the suspect pages.
//!
//! A page is suspect if it is pending on the authoritative copy or on the member's own. An `Active` member makes each as
//! the authoritative copy's; a `Syncing` one marks it unsynced again (H7) and is filled. Which settle is done is known
//! in memory only and named by (authoritative copy, its boot id, generation that began it) (M3).

use super::StorageServer;
use super::compare::Needs;
use super::handles::ReplyTo;
use super::page_ops::{Exec, Work};
use super::requests::Located;
use crate::ids::{BootId, CopyId, LayerId, VolumeId};
use crate::layer::{BLOCK_BYTES, PageKey};
use crate::wire::{Place, ReplyBody};
use bytes::Bytes;
use std::collections::BTreeSet;

impl StorageServer {
    /// The authoritative copy's side: which pages it has pending.
    pub(super) fn serve_suspects(&mut self, to: ReplyTo, volume: VolumeId, layer: LayerId, group: u32) {
        let place = Place { layer, group, page: 0, offset: 0, length: BLOCK_BYTES };
        match self.locate(volume, &place, Needs::Active) {
            Err(Located::Nonsense) => self.violation(to.conn, super::Violation::Place),
            Err(Located::Reply(reply)) => self.answer(to.conn, &to.header, BootId::NONE, reply, Bytes::new()),
            Ok((boot, key, _)) => {
                let own = self.known(volume).layer_mut(&key).expect("located");
                let pages = own.pending.keys().copied().collect();
                self.answer(to.conn, &to.header, boot, ReplyBody::Pages { pages }, Bytes::new());
            }
        }
    }

    /// The list has come: joined with the own one it is what is to settle.
    pub(super) fn listed(&mut self, copy: CopyId, pages: Vec<u64>) {
        let Some(pull) = self.pulls.get(&copy) else { return };
        let (volume, layer) = (pull.volume, pull.layer);
        let limit = self.pages_of(volume, copy, layer);
        let Some(own) = self.known(volume).copies.get(&copy).and_then(|c| c.layers.get(&layer)) else { return };
        let all: BTreeSet<u64> = own.pending.keys().copied().chain(pages).filter(|page| *page < limit).collect();
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
