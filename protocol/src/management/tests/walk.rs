//! Long random walks: servers come, go and restart, leaders die, sessions come and go. Whatever happens, every committed
//! map keeps the rules; when the trouble ends, the volume is healthy again.

use super::super::*;
use super::fake::{Fake, V};
use crate::ids::*;
use crate::map::*;
use proptest::prelude::*;

fn step(fake: &mut Fake, what: u8, who: u128, session: &mut u128) {
    match what {
        0 => fake.server(who).up = false,
        1 => fake.server(who).up = true,
        2 => fake.server(who).restart(),
        3 => fake.new_leader(),
        4 => fake.die_at = Some(Step::ALL[who as usize * 2]),
        5 => {
            let wished = fake.object.as_ref().unwrap().wishes.sessions.first().map(|s| s.id.0);
            match wished {
                Some(id) => fake.detach(id),
                None => {
                    *session += 1;
                    fake.attach(*session, "n1");
                }
            }
        }
        6 => fake.server(who).stuck ^= true,
        7 => {
            let boot = fake.server(who).boot.0;
            let pages = (SessionId(*session), (Incarnation(1), 1));
            fake.server(who).copies.values_mut().for_each(|c| c.pending = vec![pages]);
            fake.server(who).closed = boot.is_multiple_of(5) && !fake.server(who).closed;
        }
        _ => {}
    }
}

/// What must hold between any committed map and the next.
fn follows(old: &VolumeMap, new: &VolumeMap) {
    assert!(new.generation > old.generation);
    assert_eq!(new.validate(), Ok(()));
    assert!(new.sessions.len() <= 1);
    for ((_, _, before), (_, _, after)) in old.groups().zip(new.groups()) {
        let state = |copy| after.member(copy).map(|m| m.state);
        let stays = |m: &&Member| state(m.copy) == Some(MemberState::Active);
        let kept: Vec<_> = before.in_state(MemberState::Active).filter(stays).collect();
        assert!(!kept.is_empty(), "R5, I8: {old:?} {new:?}");
        let same = kept.iter().filter(|m| after.member(m.copy).map(|n| n.boot) == Some(m.boot)).count();
        if same == 0 {
            assert_eq!(after.loss, new.generation, "H5, R2");
            assert!(matches!(after.settle, Settle::Running { begun, .. } if begun == new.generation));
        } else {
            assert_eq!(after.loss, before.loss);
        }
        for m in before.in_state(MemberState::Failed) {
            assert_ne!(state(m.copy), Some(MemberState::Active), "I7: a fill comes first");
        }
        if after.settle == Settle::Over {
            assert!(matches!(before.settle, Settle::Running { .. }));
            let rejoins = |m: &&Member| before.member(m.copy).is_none_or(|b| b.state == MemberState::Failed);
            assert_eq!(after.writers().filter(rejoins).count(), 0);
        }
    }
    for s in &new.sessions {
        let is_new = old.session(s.id).is_none();
        assert!(!is_new || (!new.settling() && new.members().all(|m| !m.unpromised)), "M5, M7");
        assert_eq!(s.standing == Standing::Held, new.settling(), "M5");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]
    #[test]
    fn whatever_happens_committed_maps_keep_the_rules_and_trouble_ends(
        copies in 1u8..=3, groups in 1u8..=2,
        steps in proptest::collection::vec((0u8..8, 1u128..=4, 1u64..8_000), 1..40),
    ) {
        let mut fake = Fake::with_volume(4, copies, groups);
        let mut session = 0;
        for (what, who, ms) in steps {
            step(&mut fake, what, who, &mut session);
            fake.run(ms);
        }
        fake.die_at = None;
        for who in 1..=4 {
            let server = fake.server(who);
            if !server.up || server.closed {
                server.restart();
            }
            (server.up, server.stuck, server.closed) = (true, false, false);
        }
        fake.run(120_000);
        for pair in fake.history.windows(2) {
            follows(&pair[0], &pair[1]);
        }
        prop_assert!(fake.condition(ConditionKind::Healthy).holds, "{:#?} {}", fake.conditions, fake.story());
        prop_assert!(fake.status().retired.is_empty() && fake.status().proposed.is_none(), "{:?}", fake.status());
        if let Some(wish) = fake.object.as_ref().unwrap().wishes.sessions.first() {
            prop_assert_eq!(fake.status().session(wish.id), SessionState::Admitted);
        }
        let generations = fake.history.len();
        fake.run(300_000);
        prop_assert_eq!(fake.history.len(), generations, "nothing changes any more");
        prop_assert_eq!(fake.leader.volume(V).map(|v| &v.status), Some(fake.status()));
    }
}

impl Fake {
    /// One line for each committed map.
    pub(super) fn story(&self) -> String {
        let mut lines = Vec::new();
        for map in &self.history {
            let group = |(_, _, g): (u32, u32, &Group)| {
                let members = g.members.iter().map(|m| {
                    format!("{}{:?}b{}{}", m.server.0, m.state, m.boot.0, if m.unpromised { "!" } else { "" })
                });
                format!("[{} loss {} {:?}]", members.collect::<Vec<_>>().join(" "), g.loss, g.settle)
            };
            let groups: Vec<_> = map.groups().map(group).collect();
            let sessions =
                map.sessions.iter().map(|s| format!("{}{:?}i{}h{}", s.id.0, s.standing, s.incarnation, s.handled));
            lines.push(format!("{} {} {}", map.generation, groups.join(" "), sessions.collect::<Vec<_>>().join(" ")));
        }
        lines.join("\n")
    }
}
