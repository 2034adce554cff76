//! An `Open` is answered when its incarnation is durable here, and never otherwise (H20, R3).

use super::*;

/// A server that has opened incarnation 1, and whose device holds its answers from now on.
fn held() -> Net {
    let mut net = Net::started(1);
    net.open(0, 1, 1);
    net.servers[0].medium.hold = true;
    net
}

fn opened(net: &Net) -> usize {
    net.replies.iter().filter(|reply| matches!(reply.body, ReplyBody::Opened { .. })).count()
}

#[test]
fn a_device_that_fails_before_the_incarnation_is_durable_opens_nothing() {
    let mut net = held();
    net.send_open(0, 1, Incarnation(2), OpenNumber(1));
    net.fail_device(0);
    assert_eq!(net.replies.pop().map(|reply| reply.body), Some(ReplyBody::NotServing), "R3");
    net.servers[0].medium.hold = false;
    assert_eq!(net.try_open(0, 1, Incarnation(2), OpenNumber(2)), ReplyBody::NotServing, "no device keeps it");
    net.restart_device(0);
    net.serve(net.map_with_boots(2, |_| {}));
    let commits = net.servers[0].medium.log.len();
    net.open_incarnation(0, 2, 2, 3);
    assert!(net.servers[0].medium.log.len() > commits, "what the failed opening lost is made durable now");
    net.restart(0);
    net.serve(net.map_with_boots(3, |_| {}));
    let older = net.try_open(0, 3, Incarnation(1), OpenNumber(9));
    assert_eq!(older, ReplyBody::Superseded { highest: Incarnation(2) });
}

#[test]
fn an_open_waits_for_its_own_incarnation_not_for_a_lower_ones() {
    let mut net = held();
    net.send_open(0, 1, Incarnation(2), OpenNumber(1));
    net.send_open(0, 1, Incarnation(3), OpenNumber(1));
    net.run();
    net.answer_one(0);
    assert_eq!(opened(&net), 0, "only incarnation 2 is durable");
    net.answer_one(0);
    assert_eq!(opened(&net), 1);
}

#[test]
fn a_repeated_open_waits_for_the_incarnation_too() {
    let mut net = held();
    net.send_open(0, 1, Incarnation(2), OpenNumber(1));
    net.send_open(0, 1, Incarnation(2), OpenNumber(2));
    net.run();
    assert_eq!(opened(&net), 0, "nothing is durable yet");
    net.servers[0].medium.hold = false;
    net.run();
    assert_eq!(opened(&net), 1);
}
