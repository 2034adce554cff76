//! The CSI node service on the real kernel, over its socket: filesystems, raw blocks, and a process that is killed.
//!
//! Volumes are files of bytes in place of storage servers. Needs root, `/dev/fuse`, loop devices and the programs named
//! by each test; one that lacks something prints `skipped` and what. Mounts and loop devices are removed also when a
//! test fails.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used)]

#[path = "node/process.rs"]
mod process;
#[path = "node/program.rs"]
mod program;
#[path = "node/scene.rs"]
mod scene;

use lamina_csi_api::v1::volume_capability::access_mode::Mode;
use scene::{Scene, run};
use tonic::Code;

/// Not a test: what the tests start as processes of their own.
#[test]
#[ignore = "a part of other tests"]
fn child_process() {
    program::main();
}

#[tokio::test]
async fn files_survive_unstage_and_stage_on_both_filesystems() {
    for (filesystem, size) in [("ext4", 64 << 20), ("xfs", 400 << 20)] {
        let Some(scene) = Scene::new(&format!("files-{filesystem}"), size, &[&format!("mkfs.{filesystem}"), "blkid"])
        else {
            return;
        };
        let mut process = scene.start_serving().await;
        let mounted = scene::mounted(filesystem, Mode::SingleNodeWriter);
        let content = vec![0x5A; 3_000_000];
        for _ in 0..2 {
            process.stage(&mounted).await.unwrap();
        }
        let target = scene.target("a");
        for _ in 0..2 {
            process.publish(&mounted, &target, false).await.unwrap();
        }
        std::fs::write(target.join("file"), &content).unwrap();
        let stats = process.stats(&target).await.unwrap();
        assert!(stats.usage.iter().any(|usage| usage.used > 2_000_000), "{stats:?}");
        assert!(!stats.volume_condition.unwrap().abnormal);
        assert_eq!(process.stats(&scene.target("b")).await.unwrap_err().code(), Code::NotFound);
        let reader = scene.target("reader");
        process.publish(&mounted, &reader, true).await.unwrap();
        assert!(std::fs::read(reader.join("file")).unwrap() == content);
        assert!(std::fs::write(reader.join("other"), b"x").is_err(), "a reader's mount takes no writes");
        assert_eq!(process.unstage().await.unwrap_err().code(), Code::FailedPrecondition);
        for target in [&target, &reader, &target] {
            process.unpublish(target).await.unwrap();
            assert!(!target.exists(), "the target is removed");
        }
        for _ in 0..2 {
            process.unstage().await.unwrap();
        }
        scene.assert_nothing_left();
        process.stage(&mounted).await.unwrap();
        process.publish(&mounted, &target, false).await.unwrap();
        assert!(std::fs::read(target.join("file")).unwrap() == content, "{filesystem}");
        process.unpublish(&target).await.unwrap();
        process.unstage().await.unwrap();
        scene.assert_nothing_left();
    }
}

#[tokio::test]
async fn a_raw_block_volume_is_the_device_itself() {
    let Some(scene) = Scene::new("block", 16 << 20, &["dd", "cmp"]) else { return };
    let mut process = scene.start_serving().await;
    let block = scene::block(Mode::SingleNodeSingleWriter);
    let target = scene.target("a");
    process.stage(&block).await.unwrap();
    process.publish(&block, &target, false).await.unwrap();
    let other = process.publish(&block, &scene.target("b"), false).await.unwrap_err();
    assert_eq!(other.code(), Code::FailedPrecondition);
    assert!(!scene.target("b").exists());
    let text = target.to_str().unwrap();
    run("dd", &["if=/dev/urandom", &format!("of={text}"), "bs=1M", "count=16", "oflag=direct", "conv=notrunc"]);
    let stats = process.stats(&target).await.unwrap();
    assert_eq!(stats.usage[0].total, 16 << 20);
    process.unpublish(&target).await.unwrap();
    process.unstage().await.unwrap();
    assert!(std::fs::read(scene.bytes()).unwrap().iter().any(|byte| *byte != 0), "it reached the volume");
    scene.assert_nothing_left();
}

#[tokio::test]
async fn a_raw_block_volume_that_is_published_to_be_read_takes_no_writes() {
    let Some(scene) = Scene::new("reader", 16 << 20, &["dd", "blkdiscard"]) else { return };
    let mut process = scene.start_serving().await;
    let block = scene::block(Mode::SingleNodeWriter);
    let target = scene.target("a");
    process.stage(&block).await.unwrap();
    process.publish(&block, &target, true).await.unwrap();
    let before = std::fs::read(scene.bytes()).unwrap();
    let of = format!("of={}", target.display());
    let write = |flags: &'static [&'static str]| {
        let plain = ["if=/dev/urandom", &of, "bs=4k", "count=4", "conv=notrunc,fsync"];
        let done = std::process::Command::new("dd").args(plain).args(flags).output().unwrap();
        done.status.success()
    };
    let discard = || std::process::Command::new("blkdiscard").args(["-f", "-z"]).arg(&target).output().unwrap();
    for _ in 0..2 {
        assert!(!write(&["oflag=direct"]) && !write(&[]) && !discard().status.success());
        // Also a successor takes none.
        process.kill();
        process = scene.start_serving().await;
    }
    let refused = process.publish(&block, &scene.target("b"), false).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{}", refused.message());
    assert!(std::fs::read(scene.bytes()).unwrap() == before, "not one byte was changed");
    process.unpublish(&target).await.unwrap();
    process.publish(&block, &target, false).await.unwrap();
    assert!(write(&["oflag=direct"]), "a writer alone writes");
    process.unpublish(&target).await.unwrap();
    process.unstage().await.unwrap();
    assert!(std::fs::read(scene.bytes()).unwrap() != before);
    scene.assert_nothing_left();
}

#[tokio::test]
async fn calls_at_once_are_done_once_and_none_is_wrong() {
    let Some(scene) = Scene::new("twice", 64 << 20, &["mkfs.ext4", "blkid", "e2fsck"]) else { return };
    let mut process = scene.start_serving().await;
    let mut other = process.another();
    let mounted = scene::mounted("ext4", Mode::SingleNodeWriter);
    let target = scene.target("a");
    let fine = |results: [Result<(), tonic::Status>; 2]| {
        let codes = results.map(|result| result.map_or_else(|status| status.code(), |()| Code::Ok));
        assert!(codes.contains(&Code::Ok), "{codes:?}");
        assert!(codes.iter().all(|code| matches!(code, Code::Ok | Code::Aborted)), "{codes:?}");
    };
    let (one, two) = tokio::join!(process.stage(&mounted), other.stage(&mounted));
    fine([one, two]);
    let (one, two) = tokio::join!(process.publish(&mounted, &target, false), other.publish(&mounted, &target, false));
    fine([one, two]);
    std::fs::write(target.join("file"), b"x").unwrap();
    let (one, two) = tokio::join!(process.unpublish(&target), other.unpublish(&target));
    fine([one, two]);
    let (one, two) = tokio::join!(process.unstage(), other.unstage());
    fine([one, two]);
    scene.assert_nothing_left();
}

#[tokio::test]
async fn a_killed_process_costs_no_io_error() {
    let Some(scene) = Scene::new("kill", 256 << 20, &["fio", "mkfs.ext4", "blkid", "e2fsck"]) else { return };
    let mut process = scene.start_serving().await;
    let mounted = scene::mounted("ext4", Mode::SingleNodeWriter);
    let target = scene.target("a");
    process.stage(&mounted).await.unwrap();
    process.publish(&mounted, &target, false).await.unwrap();
    let mut fio = scene.start_fio(&target);
    for _ in 0..3 {
        tokio::time::sleep(std::time::Duration::from_millis(700)).await;
        assert!(fio.try_wait().unwrap().is_none(), "fio still writes");
        process.kill();
        process = scene.start_serving().await;
        process.stage(&mounted).await.unwrap();
        process.publish(&mounted, &target, false).await.unwrap();
    }
    let status = tokio::task::spawn_blocking(move || fio.wait()).await.unwrap().unwrap();
    assert!(status.success(), "fio saw an error");
    process.unpublish(&target).await.unwrap();
    process.unstage().await.unwrap();
    scene.assert_nothing_left();
    run("e2fsck", &["-fn", scene.bytes().to_str().unwrap()]);
}

#[tokio::test]
async fn a_volume_that_was_written_raw_is_never_formatted() {
    let Some(scene) = Scene::new("raw", 64 << 20, &["dd", "blkid"]) else { return };
    let mut process = scene.start_serving().await;
    let block = scene::block(Mode::SingleNodeWriter);
    let target = scene.target("a");
    process.stage(&block).await.unwrap();
    process.publish(&block, &target, false).await.unwrap();
    let of = format!("of={}", target.display());
    run("dd", &["if=/dev/urandom", &of, "bs=4k", "count=1", "oflag=direct", "conv=notrunc"]);
    process.unpublish(&target).await.unwrap();
    process.unstage().await.unwrap();
    let before = std::fs::read(scene.bytes()).unwrap();
    let refused = process.stage(&scene::mounted("ext4", Mode::SingleNodeWriter)).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{}", refused.message());
    process.unstage().await.unwrap();
    assert!(std::fs::read(scene.bytes()).unwrap() == before, "not one byte was changed");
    scene.assert_nothing_left();
}

#[tokio::test]
async fn xfs_grows_while_it_is_mounted() {
    let Some(scene) = Scene::new("grow", 400 << 20, &["mkfs.xfs", "xfs_growfs", "blkid"]) else { return };
    let mut process = scene.start_serving().await;
    let mounted = scene::mounted("xfs", Mode::SingleNodeWriter);
    process.stage(&mounted).await.unwrap();
    let before = process.stats(&scene.staging()).await.unwrap().usage[0].total;
    let file = std::fs::File::options().write(true).open(scene.bytes()).unwrap();
    file.set_len(800 << 20).unwrap();
    assert_eq!(process.expand(&scene.staging(), 800 << 20).await.unwrap(), 800 << 20);
    let after = process.stats(&scene.staging()).await.unwrap().usage[0].total;
    assert!(after > before + (300 << 20), "{before} -> {after}");
    process.unstage().await.unwrap();
    scene.assert_nothing_left();
}

#[tokio::test]
async fn an_incomplete_request_is_invalid_whatever_it_names() {
    let Some(scene) = Scene::new("invalid", 16 << 20, &[]) else { return };
    let mut process = scene.start_serving().await;
    for code in process.incomplete_requests().await {
        assert_eq!(code, Code::InvalidArgument);
    }
    assert_eq!(process.stats_of("nonsense", "/x").await.unwrap_err().code(), Code::NotFound);
    process.unpublish_of("nonsense", "/x").await.unwrap();
}
