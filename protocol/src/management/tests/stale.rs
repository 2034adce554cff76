//! Stale requests (PROTOCOL.md §2.5): an event only for a session that is stale for long or no longer admitted, and not
//! over and over.

use super::super::*;
use super::fake::{Fake, V};
use crate::ids::*;
use crate::storage_server::StaleSeen;

/// A server says that a session was stale, so long after the last word; what people are told of it.
fn told(fake: &mut Fake, after_ms: u64, session: u128) -> Option<String> {
    fake.now = fake.now.after(after_ms);
    let seen = StaleSeen { volume: V, session: SessionId(session), had: Generation(2), need: Generation(3) };
    let mut out = Vec::new();
    fake.leader.handle(fake.now, Input::Stale { server: ServerId(1), seen }, &mut out);
    let events = out.into_iter().filter_map(|o| if let Output::Event(event) = o { Some(event) } else { None });
    let mut stale = events.filter(|event| event.reason == EventReason::StaleSession);
    stale.next().map(|event| {
        assert_eq!((event.volume, event.server), (Some(V), Some(ServerId(1))));
        event.text
    })
}

fn attached() -> Fake {
    let mut fake = Fake::with_volume(2, 2, 1);
    fake.attach(7, "worker-3");
    fake.run(3_000);
    assert_eq!(fake.status().session(SessionId(7)), SessionState::Admitted);
    fake
}

#[test]
fn a_session_that_stays_stale_is_told_by_client_volume_had_and_need_once_a_minute() {
    let mut fake = attached();
    for second in 0..5 {
        assert_eq!(told(&mut fake, 1_000, 7), None, "second {second}: it may get its map any moment");
    }
    let text = told(&mut fake, 1_000, 7).expect("it lasts");
    for part in ["client worker-3", "volume data", "had generation 2", "needs 3"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let again: Vec<u32> = (1..=125).filter(|_| told(&mut fake, 1_000, 7).is_some()).collect();
    assert_eq!(again, [60, 120]);
}

#[test]
fn a_request_that_is_stale_now_and_then_is_no_news() {
    let mut fake = attached();
    for _ in 0..20 {
        assert_eq!(told(&mut fake, 6_000, 7), None);
    }
}

#[test]
fn a_request_of_a_session_that_is_out_is_told_at_once() {
    let mut fake = attached();
    fake.detach(7);
    fake.run(3_000);
    let text = told(&mut fake, 1_000, 7).expect("it will never get a map");
    assert!(text.contains("had generation 2"), "{text}");
    assert_eq!(told(&mut fake, 1_000, 7), None, "once a minute");
}
