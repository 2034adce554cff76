//! Where copies go (PROTOCOL.md §2; seed 002 \[0031\]): pure, from servers and wishes to places or a typed refusal.
//!
//! Never two copies of a group on one server. Copies of a group go to as many zones as there are, the first one on or
//! near the consumer's node if the policy asks for that, and the groups of a stripe rotate over the servers evenly. The
//! room of a server is its capacity times the overcommit, less what was promised to copies that lie there.

use super::object::{Policy, ZoneSpread};
use crate::ids::ServerId;
use crate::limits::{BLOCK_BYTES, MAX_COPIES, MAX_GROUPS, MAX_PAGE_BYTES, MIN_PAGE_BYTES};
use std::collections::{BTreeMap, BTreeSet};

/// A server that may take copies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Which.
    pub id: ServerId,
    /// Failure domain; empty = its own.
    pub zone: String,
    /// The node that it runs on.
    pub node: String,
    /// Bytes of all its open devices.
    pub capacity_bytes: u64,
    /// Bytes of its largest open device: a copy lies on one.
    pub largest_bytes: u64,
    /// Bytes promised to copies that lie there.
    pub provisioned_bytes: u64,
}

/// Why a volume is not placed. Tried again when servers or wishes change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The policy does not exist.
    #[error("the replication policy does not exist")]
    UnknownPolicy,
    /// A number of the policy or the size is out of range.
    #[error("the size, or a number of the replication policy, is out of range")]
    InvalidWish,
    /// Never two copies on one server.
    #[error("{copies} copies need {copies} servers that take copies, there are {servers}")]
    TooFewServers {
        /// Wished.
        copies: usize,
        /// There.
        servers: usize,
    },
    /// Each copy must have a zone of its own.
    #[error("{copies} copies need {copies} zones, there are {zones}")]
    TooFewZones {
        /// Wished.
        copies: usize,
        /// There.
        zones: usize,
    },
    /// No room.
    #[error(
        "each copy of a group needs {needed_bytes} bytes on one server; the roomiest that may take one has {room_bytes}"
    )]
    TooLarge {
        /// Of one copy.
        needed_bytes: u64,
        /// The most that a server offers.
        room_bytes: u64,
    },
}

/// Bytes that one copy of one group is promised.
pub fn share_bytes(size: u64, groups: u8, page_bytes: u32) -> u64 {
    size.div_ceil(u64::from(groups.max(1))).next_multiple_of(u64::from(page_bytes.max(1)))
}

/// Whether size and policy can be placed at all.
pub fn check(size: u64, policy: Option<&Policy>) -> Result<&Policy, Refusal> {
    let policy = policy.ok_or(Refusal::UnknownPolicy)?;
    let power_in = |bytes: u32, max: u32| bytes.is_power_of_two() && (MIN_PAGE_BYTES..=max).contains(&bytes);
    let fits = (1..=MAX_COPIES).contains(&usize::from(policy.copies))
        && (1..=MAX_GROUPS).contains(&usize::from(policy.groups))
        && power_in(policy.page_bytes, MAX_PAGE_BYTES)
        && power_in(policy.chunk_bytes, policy.page_bytes)
        && policy.overcommit_percent > 0
        && (1..=1 << 60).contains(&size);
    if fits { Ok(policy) } else { Err(Refusal::InvalidWish) }
}

/// The volume's size in whole blocks.
pub fn whole_blocks(size: u64) -> u64 {
    size.next_multiple_of(u64::from(BLOCK_BYTES))
}

/// What is asked of the servers.
#[derive(Clone, Copy, Debug)]
pub struct Need<'a> {
    /// How.
    pub policy: &'a Policy,
    /// Bytes of the volume.
    pub size: u64,
    /// The consumer's node; empty = unknown.
    pub near_node: &'a str,
    /// Its zone; empty = unknown.
    pub near_zone: &'a str,
}

/// Places every copy of every group: `[group][copy]`, first copy first.
pub fn place(need: Need<'_>, candidates: &[Candidate]) -> Result<Vec<Vec<ServerId>>, Refusal> {
    let copies = usize::from(need.policy.copies);
    if candidates.len() < copies {
        return Err(Refusal::TooFewServers { copies, servers: candidates.len() });
    }
    let mut load = BTreeMap::new();
    (0..need.policy.groups)
        .map(|_| {
            let mut members = Vec::new();
            for _ in 0..copies {
                let server = pick(need, candidates, &members, &BTreeSet::new(), &load)?;
                *load.entry(server).or_insert(0) += 1;
                members.push(server);
            }
            Ok(members)
        })
        .collect()
}

/// Places one more copy of a group whose other copies lie at `beside`; never at one of `barred`.
/// `load`: copies of this volume that each server has.
pub fn pick(
    need: Need<'_>,
    candidates: &[Candidate],
    beside: &[ServerId],
    barred: &BTreeSet<ServerId>,
    load: &BTreeMap<ServerId, u64>,
) -> Result<ServerId, Refusal> {
    let share = share_bytes(need.size, need.policy.groups, need.policy.page_bytes);
    let zones: BTreeSet<_> = candidates.iter().filter(|c| beside.contains(&c.id)).map(zone_of).collect();
    let free = |c: &&Candidate| !beside.contains(&c.id) && !barred.contains(&c.id);
    let open: Vec<_> = candidates.iter().filter(free).collect();
    if open.is_empty() {
        return Err(Refusal::TooFewServers { copies: usize::from(need.policy.copies), servers: candidates.len() });
    }
    let strict = need.policy.zones == ZoneSpread::Require;
    let apart: Vec<_> = open.into_iter().filter(|c| !strict || !zones.contains(&zone_of(c))).collect();
    if apart.is_empty() {
        let all: BTreeSet<_> = candidates.iter().map(zone_of).collect();
        return Err(Refusal::TooFewZones { copies: usize::from(need.policy.copies), zones: all.len() });
    }
    let room = |c: &Candidate| room_bytes(c, need.policy, load.get(&c.id).copied().unwrap_or(0) * share);
    let rank = |c: &&&Candidate| {
        let copies = load.get(&c.id).copied().unwrap_or(0);
        let filled = c.provisioned_bytes.saturating_mul(1000) / c.capacity_bytes.max(1);
        let distance = if beside.is_empty() { distance(need, c) } else { 0 };
        (zones.contains(&zone_of(c)), distance, copies, filled, c.id)
    };
    let roomy = apart.iter().filter(|c| room(c) >= share).min_by_key(rank);
    let most = apart.iter().map(|c| room(c)).max().unwrap_or(0);
    roomy.map(|c| c.id).ok_or(Refusal::TooLarge { needed_bytes: share, room_bytes: most })
}

/// Bytes that a server may still promise, with `more` promised by the plan under way.
fn room_bytes(c: &Candidate, policy: &Policy, more: u64) -> u64 {
    let times = |bytes: u64| (u128::from(bytes) * u128::from(policy.overcommit_percent) / 100) as u64;
    let left = times(c.capacity_bytes).saturating_sub(c.provisioned_bytes).saturating_sub(more);
    left.min(times(c.largest_bytes))
}

/// Bytes by which the copies on a server may grow.
pub(super) fn room_for_growth(c: &Candidate, policy: &Policy) -> u64 {
    room_bytes(c, policy, 0)
}

fn zone_of(c: &Candidate) -> (String, ServerId) {
    // A server without a zone is its own.
    if c.zone.is_empty() { (String::new(), c.id) } else { (c.zone.clone(), ServerId::NONE) }
}

/// 0 = on the consumer's node, 1 = in its zone, 2 = elsewhere.
fn distance(need: Need<'_>, c: &Candidate) -> u8 {
    let on_the_node = !need.near_node.is_empty() && c.node == need.near_node;
    if !need.policy.locality || on_the_node {
        0
    } else if !need.near_zone.is_empty() && c.zone == need.near_zone {
        1
    } else {
        2
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const GIB: u64 = 1 << 30;

    fn policy(copies: u8, groups: u8) -> Policy {
        Policy {
            copies,
            groups,
            chunk_bytes: 65536,
            page_bytes: 1 << 20,
            zones: ZoneSpread::Prefer,
            locality: false,
            overcommit_percent: 100,
            rebuild_after_ms: 60_000,
            fill_limit: Default::default(),
        }
    }

    fn servers(zones: &[&str]) -> Vec<Candidate> {
        let one = |(i, zone): (usize, &&str)| Candidate {
            id: ServerId(i as u128 + 1),
            zone: (*zone).to_string(),
            node: format!("n{}", i + 1),
            capacity_bytes: 10 * GIB,
            largest_bytes: 10 * GIB,
            provisioned_bytes: 0,
        };
        zones.iter().enumerate().map(one).collect()
    }

    fn need(policy: &Policy, size: u64) -> Need<'_> {
        Need { policy, size, near_node: "", near_zone: "" }
    }

    #[test]
    fn never_two_copies_of_a_group_on_one_server() {
        let p = policy(3, 16);
        for group in place(need(&p, GIB), &servers(&["", "", "", ""])).unwrap() {
            assert_eq!(group.iter().collect::<BTreeSet<_>>().len(), 3);
        }
        let p = policy(3, 1);
        let few = place(need(&p, GIB), &servers(&["", ""]));
        assert_eq!(few, Err(Refusal::TooFewServers { copies: 3, servers: 2 }));
    }

    #[test]
    fn the_groups_of_a_stripe_rotate_over_servers_evenly() {
        let p = policy(2, 6);
        let placed = place(need(&p, GIB), &servers(&["", "", "", ""])).unwrap();
        let mut load = BTreeMap::new();
        placed.iter().flatten().for_each(|s| *load.entry(*s).or_insert(0) += 1);
        assert_eq!(load.values().copied().collect::<Vec<_>>(), [3, 3, 3, 3]);
    }

    #[test]
    fn copies_go_to_different_zones() {
        let p = policy(2, 4);
        for group in place(need(&p, GIB), &servers(&["a", "a", "a", "b"])).unwrap() {
            assert!(group.contains(&ServerId(4)), "{group:?}");
        }
        let strict = Policy { zones: ZoneSpread::Require, ..policy(3, 1) };
        let refused = place(need(&strict, GIB), &servers(&["a", "a", "b"]));
        assert_eq!(refused, Err(Refusal::TooFewZones { copies: 3, zones: 2 }));
    }

    #[test]
    fn the_first_copy_is_on_or_near_the_consumers_node() {
        let p = Policy { locality: true, ..policy(2, 3) };
        let near = Need { near_node: "n3", near_zone: "b", ..need(&p, GIB) };
        for group in place(near, &servers(&["a", "a", "b", "b"])).unwrap() {
            assert_eq!(group[0], ServerId(3));
        }
        let near = Need { near_node: "elsewhere", near_zone: "b", ..need(&p, GIB) };
        assert!(place(near, &servers(&["a", "a", "b"])).unwrap().iter().all(|group| group[0] == ServerId(3)));
    }

    #[test]
    fn a_volume_larger_than_the_free_space_is_refused_and_overcommit_is_kept() {
        let two = servers(&["", ""]);
        let p = policy(2, 1);
        let refused = place(need(&p, 11 * GIB), &two);
        assert_eq!(refused, Err(Refusal::TooLarge { needed_bytes: 11 * GIB, room_bytes: 10 * GIB }));
        let p = Policy { overcommit_percent: 200, ..policy(2, 1) };
        assert!(place(need(&p, 11 * GIB), &two).is_ok());
        let mut full = two;
        full[0].provisioned_bytes = 19 * GIB;
        assert!(matches!(place(need(&p, 2 * GIB), &full), Err(Refusal::TooLarge { .. })));
    }

    #[test]
    fn several_groups_on_one_server_count_together() {
        let p = policy(1, 4);
        let one = servers(&[""]);
        assert!(place(need(&p, 10 * GIB), &one).is_ok());
        assert!(matches!(place(need(&p, 12 * GIB), &one), Err(Refusal::TooLarge { .. })));
    }

    #[test]
    fn an_unknown_or_impossible_policy_is_refused() {
        assert_eq!(check(GIB, None), Err(Refusal::UnknownPolicy));
        assert_eq!(check(GIB, Some(&policy(6, 1))), Err(Refusal::InvalidWish));
        assert_eq!(check(GIB, Some(&Policy { page_bytes: 3 << 20, ..policy(1, 1) })), Err(Refusal::InvalidWish));
        assert_eq!(check(0, Some(&policy(1, 1))), Err(Refusal::InvalidWish));
    }
}
