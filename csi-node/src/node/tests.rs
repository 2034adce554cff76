//! The volumes of a node with a machine, objects and drivers that are made up.

#![allow(clippy::unwrap_used)]

use super::*;
use crate::record::{Kind, Standing};
use lamina_crds::volume::FilesystemState;
use lamina_csi_api::in_flight::InFlight;
use lamina_protocol::wire::Start;
use std::path::{Path, PathBuf};
use tonic::{Code, Status};
use world::{VOLUME, World, handle};

#[path = "tests/twice.rs"]
mod twice;
#[path = "tests/world.rs"]
mod world;

fn stage_wish(session: u128, kind: Kind) -> StageWish {
    let path = "/staging".into();
    StageWish { volume: handle(), session, generation: 3, path, kind, flags: vec!["noatime".into()] }
}

fn publish_wish(session: u128, kind: Kind, target: &str) -> PublishWish {
    let staged = stage_wish(session, kind);
    PublishWish { staged, target: target.into(), read_only: false, alone: false }
}

fn code(error: NodeError) -> Code {
    Status::from(error).code()
}

#[tokio::test]
async fn every_step_repeated_changes_nothing() {
    for kind in [Kind::Ext4, Kind::Xfs, Kind::Block] {
        let world = World::new(3, &[1]);
        let node = world.node();
        let stage = stage_wish(1, kind);
        let publish = publish_wish(1, kind, "/pods/a");
        node.stage(&stage).await.unwrap();
        let after = world.done();
        node.stage(&stage).await.unwrap();
        assert_eq!(world.done(), after, "{kind:?}: staged twice");
        node.publish(&publish).await.unwrap();
        let after = world.done();
        node.publish(&publish).await.unwrap();
        node.stage(&stage).await.unwrap();
        assert_eq!(world.done(), after, "{kind:?}: published twice");
        for _ in 0..2 {
            node.unpublish(handle(), Path::new("/pods/a")).await.unwrap();
        }
        for _ in 0..2 {
            node.unstage(handle()).await.unwrap();
        }
        assert_eq!(world.mounts(), [""; 0], "{kind:?}");
        assert!(!world.attached(), "{kind:?}");
        assert_eq!(world.opened(), [(1, Start::Fresh)], "{kind:?}");
    }
}

#[tokio::test]
async fn a_session_that_was_left_cleanly_is_resumed_and_never_begun_anew() {
    let world = World::new(3, &[1]);
    let node = world.node();
    node.stage(&stage_wish(1, Kind::Ext4)).await.unwrap();
    node.unstage(handle()).await.unwrap();
    assert!(world.flushes() >= 2, "everything is durable and confirmed before the driver ends");
    // Also by another process.
    let node = world.node();
    drop(Box::pin(node.recover(&InFlight::new(8))).await.unwrap());
    node.stage(&stage_wish(1, Kind::Ext4)).await.unwrap();
    assert_eq!(world.opened(), [(1, Start::Fresh), (1, Start::Resume)]);
    assert_eq!(world.replays(), 1, "nothing was unanswered, and the driver is told so");
}

/// A process that has looked at what was here before.
async fn recovered(world: &World) -> Arc<Node> {
    let node = world.node();
    let mut recoveries = Box::pin(node.recover(&InFlight::new(8))).await.unwrap();
    while recoveries.join_next().await.is_some() {}
    node
}

#[tokio::test]
async fn a_reboot_costs_the_session_and_not_the_attachment() {
    let world = World::new(3, &[1]);
    let node = world.node();
    node.stage(&stage_wish(1, Kind::Ext4)).await.unwrap();
    node.publish(&publish_wish(1, Kind::Ext4, "/pods/a")).await.unwrap();
    drop(node);
    world.reboot();
    let node = recovered(&world).await;
    // The VolumeAttachment still names the first session, and the kubelet may believe it staged.
    node.publish(&publish_wish(1, Kind::Ext4, "/pods/b")).await.unwrap();
    assert_eq!(world.opened(), [(1, Start::Fresh), (101, Start::Fresh)], "never used again, another in its place");
    assert_eq!(world.mounts(), ["/pods/b", "/staging"]);
    let done = world.done();
    for _ in 0..2 {
        node.stage(&stage_wish(1, Kind::Ext4)).await.unwrap();
        node.publish(&publish_wish(1, Kind::Ext4, "/pods/b")).await.unwrap();
    }
    assert_eq!((world.done(), world.replacements()), (done, vec![1]), "staged already");
    node.unpublish(handle(), Path::new("/pods/b")).await.unwrap();
    node.unstage(handle()).await.unwrap();
    node.stage(&stage_wish(1, Kind::Ext4)).await.unwrap();
    assert_eq!(world.opened().last(), Some(&(101, Start::Resume)), "left cleanly: nothing is unanswered");
    assert_eq!(world.replacements(), [1]);
}

#[tokio::test]
async fn each_reboot_and_each_lost_holder_has_its_own_session() {
    let world = World::new(3, &[1]);
    world.node().stage(&stage_wish(1, Kind::Block)).await.unwrap();
    for lose in [World::reboot, World::holder_dies, World::reboot] {
        lose(&world);
        recovered(&world).await.stage(&stage_wish(1, Kind::Block)).await.unwrap();
    }
    let fresh = [1, 101, 201, 301].map(|session| (session, Start::Fresh));
    assert_eq!((world.opened(), world.replacements()), (fresh.to_vec(), vec![1, 101, 201]));
}

#[tokio::test]
async fn a_reply_that_was_lost_costs_no_second_session() {
    for restarts in [false, true] {
        let world = World::new(3, &[1]);
        world.node().stage(&stage_wish(1, Kind::Ext4)).await.unwrap();
        world.reboot();
        world.lose_replies(1);
        let mut node = recovered(&world).await;
        let error = node.stage(&stage_wish(1, Kind::Ext4)).await.unwrap_err();
        assert_eq!(code(error), Code::Unavailable);
        assert_eq!(world.opened(), [(1, Start::Fresh)]);
        if restarts {
            node = recovered(&world).await;
        }
        node.stage(&stage_wish(1, Kind::Ext4)).await.unwrap();
        assert_eq!((world.opened(), world.replacements()), (vec![(1, Start::Fresh), (101, Start::Fresh)], vec![1]));
    }
}

#[tokio::test]
async fn a_replaced_session_whose_record_is_lost_is_replaced_again() {
    let world = World::new(3, &[1]);
    world.node().stage(&stage_wish(1, Kind::Ext4)).await.unwrap();
    world.reboot();
    recovered(&world).await.stage(&stage_wish(1, Kind::Ext4)).await.unwrap();
    world.reboot();
    world.lose_record();
    // Nothing here says whether 101 was used: it must not be begun as if it were new.
    recovered(&world).await.stage(&stage_wish(1, Kind::Ext4)).await.unwrap();
    assert_eq!(world.opened(), [(1, Start::Fresh), (101, Start::Fresh), (201, Start::Fresh)]);
}

#[tokio::test]
async fn a_used_session_of_which_every_trace_here_is_lost_is_replaced_and_never_resumed() {
    let world = World::new(3, &[1]);
    world.node().stage(&stage_wish(1, Kind::Ext4)).await.unwrap();
    world.reboot();
    world.lose_record();
    world.lose_replies(1);
    // Only the storage servers know: they refuse to open it as if it were new.
    let error = recovered(&world).await.stage(&stage_wish(1, Kind::Ext4)).await.unwrap_err();
    assert_eq!(code(error), Code::Unavailable);
    recovered(&world).await.stage(&stage_wish(1, Kind::Ext4)).await.unwrap();
    assert_eq!(world.opened(), [(1, Start::Fresh), (1, Start::Fresh), (101, Start::Fresh)]);
}

#[tokio::test]
async fn a_session_that_the_map_knows_as_used_is_not_begun_anew_without_its_record() {
    let world = World::new(3, &[1]);
    world.incarnation(2);
    world.node().stage(&stage_wish(1, Kind::Block)).await.unwrap();
    assert_eq!((world.opened(), world.replacements()), (vec![(101, Start::Fresh)], vec![1]));
}

#[tokio::test]
async fn an_attachment_that_was_taken_away_gets_no_session() {
    let world = World::new(3, &[1]);
    world.node().stage(&stage_wish(1, Kind::Ext4)).await.unwrap();
    world.reboot();
    world.admit(4, &[2]);
    let node = recovered(&world).await;
    let error = node.stage(&stage_wish(1, Kind::Ext4)).await.unwrap_err();
    assert_eq!(code(error), Code::FailedPrecondition);
    assert_eq!((world.opened(), world.replacements()), (vec![(1, Start::Fresh)], vec![]));
    node.unstage(handle()).await.unwrap();
    node.stage(&StageWish { generation: 4, ..stage_wish(2, Kind::Ext4) }).await.unwrap();
    assert_eq!(world.opened(), [(1, Start::Fresh), (2, Start::Fresh)]);
}

#[tokio::test]
async fn a_formatting_that_a_reboot_cut_short_is_begun_anew_under_the_next_session() {
    let world = World::new(3, &[1]);
    world.at("format ext4", |world| world.fail_once("format ext4"));
    world.node().stage(&stage_wish(1, Kind::Ext4)).await.unwrap_err();
    world.filesystem(Some(("ext4", FilesystemState::Formatting)), None, false);
    world.reboot();
    recovered(&world).await.stage(&stage_wish(1, Kind::Ext4)).await.unwrap();
    assert_eq!(world.replacements(), [1]);
    assert_eq!(world.noted(), Some(("ext4".to_owned(), FilesystemState::Formatted)));
    assert_eq!(world.mounts(), ["/staging"]);
}

#[tokio::test]
async fn a_successor_takes_over_a_held_device_driver_first() {
    let world = World::new(3, &[1]);
    world.node().stage(&stage_wish(1, Kind::Ext4)).await.unwrap();
    world.node_dies();
    let node = world.node();
    let calls = InFlight::new(8);
    let mut recoveries = Box::pin(node.recover(&calls)).await.unwrap();
    assert!(calls.enter(handle()).is_err(), "no call touches the volume meanwhile");
    while recoveries.join_next().await.is_some() {}
    assert!(calls.enter(handle()).is_ok());
    assert_eq!(world.opened(), [(1, Start::Fresh), (1, Start::Resume)]);
    let done = world.done();
    let order: Vec<_> = done.iter().filter(|step| step.contains("esume")).map(String::as_str).collect();
    assert_eq!(order, ["open Resume", "resume"], "the members refuse the older incarnation before the device is taken");
    assert_eq!(world.replays(), 1);
    node.stage(&stage_wish(1, Kind::Ext4)).await.unwrap();
    assert_eq!(world.done(), done, "it is staged already");
}

#[tokio::test]
async fn a_new_session_cuts_off_what_an_earlier_one_left() {
    let world = World::new(3, &[1]);
    let node = world.node();
    node.publish(&publish_wish(1, Kind::Ext4, "/pods/a")).await.unwrap_err();
    node.stage(&stage_wish(1, Kind::Ext4)).await.unwrap();
    node.publish(&publish_wish(1, Kind::Ext4, "/pods/a")).await.unwrap();
    world.admit(5, &[2]);
    node.stage(&StageWish { generation: 5, ..stage_wish(2, Kind::Ext4) }).await.unwrap();
    assert_eq!(world.mounts(), ["/staging"], "the old consumer's mount is gone");
    assert!(world.done().contains(&"force_detach".to_owned()));
    assert_eq!(world.opened(), [(1, Start::Fresh), (2, Start::Fresh)]);
}

#[tokio::test]
async fn an_ended_session_frees_its_users_and_is_replaced_when_they_are_gone() {
    for out_of_the_map in [false, true] {
        an_ended_session_is_replaced(out_of_the_map).await;
    }
}

async fn an_ended_session_is_replaced(out_of_the_map: bool) {
    let world = World::new(3, &[1]);
    let node = world.node();
    node.stage(&stage_wish(1, Kind::Ext4)).await.unwrap();
    node.publish(&publish_wish(1, Kind::Ext4, "/pods/a")).await.unwrap();
    world.end_session();
    world.until(|world| world.done().contains(&"force_detach".to_owned())).await;
    let error = node.publish(&publish_wish(1, Kind::Ext4, "/pods/b")).await.unwrap_err();
    assert!(matches!(error, NodeError::Ended), "a consumer still has the old device: {error}");
    let (_, _, health) = node.stats(handle(), Path::new("/staging")).await.unwrap();
    assert!(health.abnormal, "{}", health.message);
    assert!(world.replacements().is_empty());
    node.unpublish(handle(), Path::new("/pods/a")).await.unwrap();
    node.unstage(handle()).await.unwrap();
    assert_eq!(world.mounts(), [""; 0]);
    world.serves_again();
    // Whether a map lists it still (a driver gave it up) or not: what it was asked may lie on some copies only.
    if out_of_the_map {
        world.commit_without_sessions();
    }
    node.stage(&stage_wish(1, Kind::Ext4)).await.unwrap();
    assert_eq!((world.opened().last(), world.replacements()), (Some(&(101, Start::Fresh)), vec![1]));
}

#[tokio::test]
async fn no_driver_is_opened_before_a_map_lists_the_session() {
    let world = World::new(2, &[]);
    let node = world.node();
    assert_eq!(code(node.stage(&stage_wish(1, Kind::Block)).await.unwrap_err()), Code::Unavailable);
    world.admit(3, &[9]);
    assert_eq!(code(node.stage(&stage_wish(1, Kind::Block)).await.unwrap_err()), Code::FailedPrecondition);
    assert!(world.opened().is_empty());
    world.admit(4, &[9, 1]);
    node.stage(&stage_wish(1, Kind::Block)).await.unwrap();
}

#[tokio::test]
async fn a_volume_that_nobody_knows_is_not_found_and_taking_it_away_is_done() {
    let world = World::new(3, &[1]);
    let node = world.node();
    let other = VolumeHandle::new(VOLUME + 1);
    let wish = StageWish { volume: other, ..stage_wish(1, Kind::Ext4) };
    assert_eq!(code(node.stage(&wish).await.unwrap_err()), Code::NotFound);
    world.foreign_mount("/pods/a");
    node.unpublish(other, Path::new("/pods/a")).await.unwrap();
    node.unstage(other).await.unwrap();
    assert_eq!(world.mounts(), ["/pods/a"], "another's mount stays");
    assert_eq!(code(node.stats(other, Path::new("/staging")).await.unwrap_err()), Code::NotFound);
    assert_eq!(code(node.expand(other, Path::new("/staging"), 0).await.unwrap_err()), Code::NotFound);
}

#[tokio::test]
async fn a_foreign_mount_at_the_staging_path_is_not_taken_for_the_volume() {
    let world = World::new(3, &[1]);
    world.foreign_mount("/staging");
    let error = world.node().stage(&stage_wish(1, Kind::Ext4)).await.unwrap_err();
    assert_eq!(code(error), Code::AlreadyExists);
    assert_eq!(world.mounts(), ["/staging"]);
}

#[tokio::test]
async fn a_lone_workload_gets_no_second_place() {
    let world = World::new(3, &[1]);
    let node = world.node();
    node.stage(&stage_wish(1, Kind::Ext4)).await.unwrap();
    let alone = |target| PublishWish { alone: true, ..publish_wish(1, Kind::Ext4, target) };
    node.publish(&alone("/pods/a")).await.unwrap();
    let before = world.done();
    assert_eq!(code(node.publish(&alone("/pods/b")).await.unwrap_err()), Code::FailedPrecondition);
    assert_eq!(world.done(), before, "nothing was made");
    node.publish(&alone("/pods/a")).await.unwrap();
    let other = PublishWish { read_only: true, ..alone("/pods/a") };
    assert_eq!(code(node.publish(&other).await.unwrap_err()), Code::AlreadyExists);
}

#[tokio::test]
async fn consumers_of_a_raw_volume_all_write_or_all_only_read() {
    let world = World::new(3, &[1]);
    let node = world.node();
    node.stage(&stage_wish(1, Kind::Block)).await.unwrap();
    let reader = |target| PublishWish { read_only: true, ..publish_wish(1, Kind::Block, target) };
    node.publish(&reader("/pods/a")).await.unwrap();
    assert_eq!(&world.done()[2..], ["only read", "bind"], "before it is shown");
    node.publish(&reader("/pods/b")).await.unwrap();
    let before = world.done();
    let error = node.publish(&publish_wish(1, Kind::Block, "/pods/c")).await.unwrap_err();
    assert!(matches!(error, NodeError::MixedUse), "{error}");
    assert_eq!(code(node.publish(&publish_wish(1, Kind::Block, "/pods/a")).await.unwrap_err()), Code::AlreadyExists);
    assert_eq!((world.done(), world.mounts()), (before, vec!["/pods/a".to_owned(), "/pods/b".to_owned()]));
    // A successor holds to it.
    drop(node);
    world.node_dies();
    let node = recovered(&world).await;
    assert_eq!(world.modes().last().unwrap(), "only read");
    for target in ["/pods/a", "/pods/b"] {
        node.unpublish(handle(), Path::new(target)).await.unwrap();
    }
    node.publish(&publish_wish(1, Kind::Block, "/pods/c")).await.unwrap();
    assert_eq!(world.modes().last().unwrap(), "write again");
    let error = node.publish(&reader("/pods/a")).await.unwrap_err();
    assert!(matches!(error, NodeError::MixedUse), "{error}");
    assert_eq!(world.modes().last().unwrap(), "write again", "the writer goes on");
}

#[tokio::test]
async fn a_published_volume_is_not_unstaged() {
    let world = World::new(3, &[1]);
    let node = world.node();
    node.stage(&stage_wish(1, Kind::Block)).await.unwrap();
    node.publish(&publish_wish(1, Kind::Block, "/pods/a")).await.unwrap();
    assert_eq!(code(node.unstage(handle()).await.unwrap_err()), Code::FailedPrecondition);
    assert!(world.attached());
}

#[tokio::test]
async fn a_filesystem_is_made_once_and_only_on_what_was_never_written() {
    use FilesystemState::{Formatted, Formatting};
    // noted, on the device, blank; formatted?, or the refusal
    type Case = (Option<(&'static str, FilesystemState)>, Option<&'static str>, bool, Result<bool, Code>);
    let refused = Err(Code::FailedPrecondition);
    let cases: [Case; 13] = [
        (None, None, true, Ok(true)),
        (None, None, false, refused),
        (None, Some("ext4"), false, Ok(false)),
        (None, Some("xfs"), false, refused),
        (None, Some("LVM2_member"), false, refused),
        (Some(("ext4", Formatting)), None, false, Ok(true)),
        (Some(("ext4", Formatting)), Some("ext4"), false, Ok(true)),
        (Some(("xfs", Formatting)), Some("xfs"), false, Ok(true)),
        (Some(("xfs", Formatting)), Some("ext4"), false, Ok(true)),
        (Some(("ext4", Formatting)), Some("LVM2_member"), false, refused),
        (Some(("ext4", Formatted)), Some("ext4"), false, Ok(false)),
        (Some(("ext4", Formatted)), None, true, refused),
        (Some(("xfs", Formatted)), Some("xfs"), false, refused),
    ];
    for (noted, signature, blank, expected) in cases {
        let world = World::new(3, &[1]);
        world.filesystem(noted, signature, blank);
        let staged = world.node().stage(&stage_wish(1, Kind::Ext4)).await;
        let formatted = world.done().contains(&"format ext4".to_owned());
        let result = staged.map(|()| formatted).map_err(code);
        assert_eq!(result, expected, "{noted:?} {signature:?} {blank}");
        if expected.is_ok() {
            assert_eq!(world.noted(), Some(("ext4".to_owned(), Formatted)));
            assert_eq!(world.mounts(), ["/staging"]);
        } else {
            assert!(!formatted, "{noted:?} {signature:?} {blank}");
            assert_eq!(world.mounts(), [""; 0]);
        }
    }
}

#[tokio::test]
async fn nothing_is_formatted_while_nobody_says_whether_it_was_written() {
    let world = World::new(3, &[1]);
    world.servers_away(true);
    let node = world.node();
    let error = node.stage(&stage_wish(1, Kind::Ext4)).await.unwrap_err();
    assert_eq!(code(error), Code::Unavailable);
    assert_eq!((world.noted(), world.done().contains(&"format ext4".to_owned())), (None, false));
    world.servers_away(false);
    node.stage(&stage_wish(1, Kind::Ext4)).await.unwrap();
    assert_eq!(world.mounts(), ["/staging"]);
}

#[tokio::test]
async fn a_session_that_is_out_by_now_does_not_note_a_formatting() {
    // Blank when it was asked; then another session had the volume raw, and wrote.
    let world = World::new(3, &[1]);
    world.at("attach", |world| world.admit(4, &[2]));
    let error = world.node().stage(&stage_wish(1, Kind::Ext4)).await.unwrap_err();
    assert!(matches!(error, NodeError::Objects(crate::objects::ObjectError::NotListed)), "{error}");
    assert_eq!((world.noted(), world.done().contains(&"format ext4".to_owned())), (None, false));
}

#[tokio::test]
async fn a_volume_written_without_a_filesystem_is_refused_with_what_to_do() {
    let world = World::new(3, &[1]);
    world.filesystem(None, None, false);
    let error = world.node().stage(&stage_wish(1, Kind::Ext4)).await.unwrap_err();
    let text = error.to_string();
    assert!(text.contains("byte 41943040") && text.contains("make a new one"), "{text}");
    assert_eq!(code(error), Code::FailedPrecondition);
}

#[tokio::test]
async fn formatting_is_noted_before_and_its_end_before_the_first_mount() {
    let world = World::new(3, &[1]);
    world.node().stage(&stage_wish(1, Kind::Xfs)).await.unwrap();
    let steps = ["note Formatting", "format xfs", "note Formatted", "mount xfs"];
    let done = world.done();
    let order: Vec<_> = steps.iter().map(|step| done.iter().position(|done| done == step).unwrap()).collect();
    assert!(order.is_sorted(), "{done:?}");
}

#[tokio::test]
async fn a_raw_use_ends_the_right_to_format_again() {
    let world = World::new(3, &[1]);
    world.filesystem(Some(("ext4", FilesystemState::Formatting)), None, false);
    world.node().stage(&stage_wish(1, Kind::Block)).await.unwrap();
    assert_eq!(world.noted(), None);
}

#[tokio::test]
async fn growth_waits_for_the_volume_then_device_and_filesystem_follow() {
    let world = World::new(3, &[1]);
    let node = world.node();
    node.stage(&stage_wish(1, Kind::Xfs)).await.unwrap();
    let at = PathBuf::from("/staging");
    let error = node.expand(handle(), &at, 128 << 20).await.unwrap_err();
    assert_eq!(code(error), Code::Unavailable);
    world.grow(128 << 20);
    assert_eq!(node.expand(handle(), &at, 128 << 20).await.unwrap(), 128 << 20);
    assert!(world.done().ends_with(&["grow device".to_owned(), "grow xfs".to_owned()]));
    assert_eq!(code(node.expand(handle(), Path::new("/else"), 0).await.unwrap_err()), Code::NotFound);
}

#[tokio::test]
async fn a_step_that_fails_is_gone_on_from_by_the_next_call() {
    for step in ["attach", "format ext4", "mount ext4", "note Formatted"] {
        let world = World::new(3, &[1]);
        let node = world.node();
        world.fail_once(step);
        node.stage(&stage_wish(1, Kind::Ext4)).await.expect_err(step);
        node.stage(&stage_wish(1, Kind::Ext4)).await.expect(step);
        assert_eq!(world.mounts(), ["/staging"], "{step}");
        node.unstage(handle()).await.unwrap();
        assert!(!world.attached(), "{step}");
        assert_eq!(world.record().unwrap().standing, Standing::Closed, "{step}");
    }
}

#[tokio::test]
async fn the_metrics_page_shows_every_volume_in_whole_families() {
    let world = World::new(3, &[1]);
    let node = world.node();
    node.stage(&stage_wish(1, Kind::Block)).await.unwrap();
    let page = crate::metrics::page(&node);
    assert!(page.ends_with("# EOF\n"));
    let label = format!("volume=\"{}\"", handle());
    let requests = page.lines().filter(|line| line.starts_with("lamina_client_requests_total{"));
    assert_eq!(requests.filter(|line| line.contains(&label)).count(), 4, "{page}");
    let buckets = page.lines().filter(|line| line.starts_with("lamina_client_latency_seconds_bucket{"));
    assert_eq!(buckets.filter(|line| line.contains("le=\"+Inf\"")).count(), 4);
    // A family is declared once, before its samples.
    let mut family = "";
    for line in page.lines().filter(|line| !line.starts_with("# HELP") && !line.starts_with("# EOF")) {
        match line.strip_prefix("# TYPE ") {
            Some(declared) => family = declared.split(' ').next().unwrap(),
            None => assert!(line.starts_with(family), "{line} is no sample of {family}"),
        }
    }
}
