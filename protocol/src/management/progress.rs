//! How far fills and settles of a volume are, for people (seed 002 Fig. 6); nothing is decided by it.
//!
//! Invariant: the pages in all that are told of a copy are those that there were to do when its work began, as the answer
//! to the fence said that began it, or as a leader that came later heard first: a rejoin by difference counts by the
//! difference. They are never fewer than those that are left. What ends is told as gone.

use super::Output;
use super::plan::Answer;
use super::volume::{Volume, World};
use crate::control::{CopyProgress, CopyReport, SETTLE_ANEW};
use crate::ids::{BootId, CopyId, ServerId};
use crate::map::MemberState;
use crate::time::Millis;
use std::collections::BTreeMap;

/// Progress is told at the latest after this, milliseconds.
const PROGRESS_MS: u64 = 10_000;
/// It is told when so manieth a part of the work is done.
const STEPS: u64 = 20;

/// What people were told of a volume's copies.
#[derive(Debug, Default)]
pub(super) struct Progress {
    at: Millis,
    told: Vec<CopyProgress>,
    begun: BTreeMap<CopyId, Begun>,
}

/// Work on a copy, under one opening of its device.
#[derive(Clone, Copy, Debug)]
struct Begun {
    boot: BootId,
    settles: bool,
    pages: u64,
}

impl Progress {
    /// So much is left of this work: it is that which is known, or begins.
    fn note(&mut self, copy: CopyId, boot: BootId, settles: bool, left: u64) -> u64 {
        let now = Begun { boot, settles, pages: left };
        let begun = self.begun.entry(copy).or_insert(now);
        if (begun.boot, begun.settles) != (boot, settles) {
            *begun = now;
        }
        begun.pages = begun.pages.max(left);
        begun.pages
    }
}

/// Whether a copy that is not being filled settles; and the pages that are left to do, `None` = not known yet.
fn left(p: &CopyProgress, state: MemberState) -> (bool, Option<u64>) {
    let settles = state != MemberState::Syncing && p.to_settle > 0;
    if !settles {
        return (false, Some(p.unsynced));
    }
    (true, (p.to_settle != SETTLE_ANEW).then_some(p.to_settle))
}

impl Volume {
    /// The answers to a fence say how much each copy lacks that the committed map lists as `Syncing`.
    pub(super) fn fills_begun(&mut self, answers: &BTreeMap<ServerId, Answer>) {
        let promised = answers.values().filter_map(|a| if let Answer::Promised(p) = a { Some(p) } else { None });
        let syncing = |report: &&CopyReport| {
            let member = self.map().and_then(|map| map.place_of(report.copy)).map(|(_, _, member)| member);
            member.is_some_and(|m| m.state == MemberState::Syncing && m.boot == report.boot)
        };
        let begun: Vec<_> = promised.flat_map(|p| &p.copies).filter(syncing).cloned().collect();
        for report in begun {
            self.progress.note(report.copy, report.boot, false, report.unsynced);
        }
    }

    pub(super) fn show_progress(&mut self, world: &mut World<'_>) {
        let Some(map) = self.object.status.map.as_ref() else { return };
        let serving = map.members().filter(|m| m.state != MemberState::Failed);
        let reported = serving.filter_map(|m| {
            let progress = world.servers.of(m.server).and_then(|s| s.progress(m.copy))?;
            let works = !progress.boot.is_none() && (progress.unsynced > 0 || progress.to_settle > 0);
            works.then_some((*progress, m.state))
        });
        let reported: Vec<_> = reported.collect();
        let syncing: Vec<_> = map.members().filter(|m| m.state == MemberState::Syncing).map(|m| m.copy).collect();
        let works = |copy: &CopyId| syncing.contains(copy) || reported.iter().any(|(p, _)| p.copy == *copy);
        self.progress.begun.retain(|copy, _| works(copy));
        let mut copies = Vec::new();
        for (mut p, state) in reported {
            if let (settles, Some(left)) = left(&p, state) {
                p.pages = self.progress.note(p.copy, p.boot, settles, left);
            }
            copies.push(p);
        }
        let Progress { at, told, .. } = &self.progress;
        let step = |(a, b): (&CopyProgress, &CopyProgress)| {
            let part = (a.pages / STEPS).max(1);
            a.copy != b.copy || a.unsynced.abs_diff(b.unsynced) >= part || a.to_settle.abs_diff(b.to_settle) >= part
        };
        let far = copies.len() != told.len() || copies.iter().zip(told).any(step);
        if far || (copies != *told && world.now.since(*at) >= PROGRESS_MS) {
            (self.progress.at, self.progress.told) = (world.now, copies.clone());
            world.out.push(Output::Progress { volume: self.id(), copies });
        }
    }
}
