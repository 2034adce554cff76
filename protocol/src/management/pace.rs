//! The pace of fills: servers that fill copies are told what policies and the operator's budget let each copy take.
//!
//! Invariants: a server with a `Syncing` member is told before it is handed the map, once for each generation and whenever
//! its share changes; the shares of all copies that are filled never exceed the budget, of a server and of the cluster, but
//! for as long as it takes to tell; nothing is decided by any of it. Fills yield to foreground I/O at the server.

use super::serve::AGAIN_MS;
use super::volume::{Volume, What, World};
use crate::control::{ControlReply, ControlRequest, FillLimit};
use crate::ids::{Generation, ServerId, VolumeId};
use crate::map::{MemberState, VolumeMap};
use crate::time::Millis;
use std::collections::BTreeMap;

/// What fills of all volumes may take together, beside what policies say of one volume; 0 = no limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct FillBudget {
    /// Bytes per second that one server pulls.
    pub server_bytes_per_second: u64,
    /// Bytes per second that all servers of the cluster pull.
    pub cluster_bytes_per_second: u64,
}

/// How many copies of a volume are filled at each server.
pub(super) type Filling = BTreeMap<ServerId, u64>;

/// What a server was told.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pace {
    generation: Generation,
    limit: FillLimit,
    asked: Millis,
    done: bool,
}

impl Volume {
    /// Copies that are to be filled now.
    pub(super) fn filling(&self) -> Filling {
        let mut filling = Filling::new();
        let members = self.map().into_iter().flat_map(VolumeMap::members);
        members.filter(|m| m.state == MemberState::Syncing).for_each(|m| *filling.entry(m.server).or_default() += 1);
        filling
    }

    /// Tells every server that fills a copy its pace, if it was not told yet.
    pub(super) fn limit_fills(&mut self, world: &mut World<'_>) {
        let (volume, generation) = (self.id(), self.status().generation);
        let policy = self.policy().map(|policy| policy.fill_limit).unwrap_or_default();
        let filling = self.filling();
        self.paces.retain(|id, _| filling.contains_key(id));
        for id in filling.keys().copied() {
            let limit = share(policy, world.fill_budget, id, &filling, others(world.filling, volume));
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

fn others(all: &BTreeMap<VolumeId, Filling>, but: VolumeId) -> impl Iterator<Item = (ServerId, u64)> + Clone {
    all.iter()
        .filter(move |(volume, _)| **volume != but)
        .flat_map(|(_, f)| f)
        .map(|(server, copies)| (*server, *copies))
}

/// What the fill of one copy of a volume may take at a server.
fn share(
    policy: FillLimit,
    budget: FillBudget,
    server: ServerId,
    own: &Filling,
    others: impl Iterator<Item = (ServerId, u64)> + Clone,
) -> FillLimit {
    let here = own.get(&server).copied().unwrap_or(0).max(1);
    let at_server = here + others.clone().filter(|(at, _)| *at == server).map(|(_, copies)| copies).sum::<u64>();
    let anywhere = own.values().chain([&0]).sum::<u64>() + others.map(|(_, copies)| copies).sum::<u64>();
    let limits = [
        (policy.bytes_per_second, here),
        (budget.server_bytes_per_second, coarse(at_server)),
        (budget.cluster_bytes_per_second, coarse(anywhere.max(here))),
    ];
    let limited = limits.into_iter().filter(|(bytes, _)| *bytes > 0);
    let bytes_per_second = limited.map(|(bytes, copies)| (bytes / copies).max(1)).min().unwrap_or(0);
    let pages = if policy.pages == 0 { 0 } else { (u64::from(policy.pages) / here).max(1) as u32 };
    FillLimit { bytes_per_second, pages }
}

/// Rounded up to one of at most eight steps for each doubling: not every fill that begins or ends is told to all others.
fn coarse(copies: u64) -> u64 {
    copies.next_multiple_of((copies.next_power_of_two() / 16).max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HERE: ServerId = ServerId(1);
    const MIB: u64 = 1 << 20;

    fn bytes(policy: u64, server: u64, cluster: u64, own: u64, others: &[(u128, u64)]) -> u64 {
        let budget = FillBudget { server_bytes_per_second: server, cluster_bytes_per_second: cluster };
        let policy = FillLimit { bytes_per_second: policy, pages: 0 };
        let others = others.iter().map(|(server, copies)| (ServerId(*server), *copies));
        share(policy, budget, HERE, &Filling::from([(HERE, own)]), others).bytes_per_second
    }

    #[test]
    fn fills_share_what_a_policy_a_server_and_the_cluster_allow() {
        assert_eq!(bytes(0, 0, 0, 3, &[(1, 5)]), 0, "no limit");
        assert_eq!(bytes(6 * MIB, 0, 0, 3, &[(1, 5)]), 2 * MIB, "a policy's is shared by the volume's own");
        assert_eq!(bytes(0, 8 * MIB, 0, 3, &[(1, 1), (2, 9)]), 2 * MIB, "a server's by all that are filled there");
        assert_eq!(bytes(0, 0, 8 * MIB, 1, &[(1, 1), (2, 6)]), MIB, "the cluster's by all");
        assert_eq!(bytes(3 * MIB, 8 * MIB, 20 * MIB, 1, &[(1, 1), (2, 2)]), 3 * MIB, "the least counts");
    }

    #[test]
    fn however_many_fills_there_are_they_never_take_more_than_the_budget() {
        for copies in 1..2_000 {
            assert!(bytes(0, 0, 100 * MIB, copies, &[]) * copies <= 100 * MIB, "{copies}");
            assert!(coarse(copies) < copies + copies / 7 + 1, "{copies}: {}", coarse(copies));
        }
        let steps: std::collections::BTreeSet<_> = (1_025..=2_048).map(coarse).collect();
        assert_eq!(steps.len(), 8);
    }

    #[test]
    fn pages_at_once_are_shared_by_the_copies_of_a_volume_at_a_server() {
        let pages = |pages, own| {
            let policy = FillLimit { bytes_per_second: 0, pages };
            share(policy, FillBudget::default(), HERE, &Filling::from([(HERE, own)]), [].into_iter()).pages
        };
        assert_eq!((pages(0, 2), pages(8, 2), pages(2, 4)), (0, 4, 1));
    }
}
