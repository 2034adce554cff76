//! The device that pods see, on the real kernel: FUSE file, loop device, holder, successors.
//!
//! Needs root, `/dev/fuse` and loop devices; a test that lacks them, or a program, prints `skipped` and what.
//! Every test makes its own directory, mounts and loop devices and removes them also when it fails.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used)]

#[path = "device/child.rs"]
mod child;
#[path = "device/scene.rs"]
mod scene;
#[path = "device/targets.rs"]
mod targets;

use lamina_client::ram::RamVolume;
use lamina_csi_node::device::mounts::{self, MountState};
use lamina_csi_node::device::{self, DeviceError, DeviceKind};
use scene::{MIB, Scene, run, run_fails};
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use targets::{Deaf, Superseding};

#[test]
fn ext4_on_the_device_keeps_its_files_over_detach_and_attach() {
    let Some(scene) = Scene::new("ext4", &["mkfs.ext4", "fsck.ext4"]) else { return };
    let ram = Arc::new(RamVolume::new(64 * MIB));
    let device = scene.attach(ram.clone()).unwrap();
    run("mkfs.ext4", &["-q", "-F", device.path().to_str().unwrap()]);
    let content = vec![0xA5; 3_000_000];
    {
        let mounted = scene.mount_fs("ext4", device.path());
        std::fs::write(mounted.path.join("file"), &content).unwrap();
        assert!(matches!(device.detach(), Err(DeviceError::Busy)), "a mounted device does not go");
    }
    device.detach().unwrap();
    assert!(ram.flushes() > 0, "the file system's barriers reach the volume");
    let device = scene.attach(ram).unwrap();
    run("fsck.ext4", &["-fn", device.path().to_str().unwrap()]);
    {
        let mounted = scene.mount_fs("ext4", device.path());
        assert!(std::fs::read(mounted.path.join("file")).unwrap() == content);
    }
    device.detach().unwrap();
    scene.assert_nothing_left();
}

#[test]
fn the_device_has_whole_blocks_direct_io_and_discards() {
    let Some(scene) = Scene::new("queue", &[]) else { return };
    let device = scene.attach(Arc::new(RamVolume::new(MIB))).unwrap();
    let told = |name| scene::attribute(device.path(), name);
    assert_eq!(device.kind(), DeviceKind::Fuse);
    assert_eq!(scene::size_of(device.path()), MIB);
    assert_eq!(told("queue/logical_block_size"), 4096);
    assert_eq!((told("loop/dio"), told("ro")), (1, 0));
    assert_eq!(told("queue/discard_granularity"), 4096);
    assert!(told("queue/discard_max_bytes") > 0 && told("queue/write_zeroes_max_bytes") > 0);
    device.detach().unwrap();
    device.detach().unwrap();
    scene.assert_nothing_left();
}

#[test]
fn fio_verifies_what_it_wrote_at_depth() {
    let Some(scene) = Scene::new("fio", &["fio"]) else { return };
    let device = scene.attach(Arc::new(RamVolume::new(64 * MIB))).unwrap();
    for (block, size) in [("4k", "32M"), ("1M", "64M")] {
        run("fio", &scene::fio_arguments(device.path(), block, size));
    }
    device.detach().unwrap();
    scene.assert_nothing_left();
}

#[test]
fn discards_and_write_zeroes_of_any_size_read_back_as_zeroes() {
    let Some(scene) = Scene::new("discard", &["blkdiscard", "dd"]) else { return };
    let ram = Arc::new(RamVolume::new(160 * MIB));
    let device = scene.attach(ram.clone()).unwrap();
    let path = device.path().to_str().unwrap().to_owned();
    let fill = || {
        let node = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        for at in 0..160 {
            node.write_all_at(&vec![0xEE; MIB as usize], at * MIB).unwrap();
        }
        node.sync_all().unwrap();
        assert_eq!(ram.bytes_at(100 << 20, 4), [0xEE; 4]);
    };
    for zero_out in [false, true] {
        fill();
        let mut arguments = vec!["-o", "4096", "-l", "150994944", &path];
        if zero_out {
            arguments.push("-z");
        }
        run("blkdiscard", &arguments);
        let bytes = std::fs::read(&path).unwrap();
        let end = 4096 + 150_994_944;
        assert!(bytes[..4096].iter().all(|byte| *byte == 0xEE), "before the range");
        assert!(bytes[4096..end].iter().all(|byte| *byte == 0), "in the range");
        assert!(bytes[end..].iter().all(|byte| *byte == 0xEE), "behind the range");
    }
    device.detach().unwrap();
}

#[test]
fn a_grown_volume_shows_its_new_size_while_in_use() {
    let Some(scene) = Scene::new("growth", &["mkfs.xfs", "xfs_growfs"]) else { return };
    let ram = Arc::new(RamVolume::new(320 * MIB));
    let device = scene.attach(ram.clone()).unwrap();
    run("mkfs.xfs", &["-q", "-f", device.path().to_str().unwrap()]);
    {
        let mounted = scene.mount_fs("xfs", device.path());
        let blocks = || rustix::fs::statvfs(&mounted.path).unwrap();
        let before = blocks().f_blocks * blocks().f_frsize;
        ram.grow(480 * MIB);
        assert_eq!(device.grow().unwrap(), 480 * MIB);
        assert_eq!(scene::size_of(device.path()), 480 * MIB);
        run("xfs_growfs", &[mounted.path.to_str().unwrap()]);
        assert!(blocks().f_blocks * blocks().f_frsize > before + 100 * MIB);
    }
    device.detach().unwrap();
}

#[test]
fn a_read_only_volume_is_a_read_only_device() {
    let Some(scene) = Scene::new("read_only", &["dd"]) else { return };
    let device = scene.attach(Arc::new(RamVolume::new(MIB).into_read_only())).unwrap();
    assert_eq!(std::fs::read(device.path()).unwrap(), vec![0; MIB as usize]);
    let to = format!("of={}", device.path().display());
    run_fails("dd", &["if=/dev/zero", &to, "bs=4096", "count=1", "conv=fsync,notrunc"]);
    device.detach().unwrap();
}

#[test]
fn a_killed_process_costs_no_error_when_a_successor_takes_over() {
    let Some(scene) = Scene::new("kill", &["fio"]) else { return };
    let _holder = scene.start_holder();
    let mut serving = scene.start_serving(child::ATTACH);
    let path = serving.device_path();
    let mut fio = scene.start_fio(&path, "32M");
    for round in 0..3 {
        std::thread::sleep(Duration::from_millis(700));
        assert!(fio.is_running(), "fio still runs in round {round}, else this proves nothing");
        serving.kill();
        std::thread::sleep(Duration::from_millis(300));
        serving = scene.start_serving(child::RESUME);
        assert_eq!(serving.device_path(), path);
    }
    fio.finish();
    serving.say("detach");
    scene.assert_nothing_left();
}

#[test]
fn a_process_that_hangs_is_ended_by_the_take_over_and_costs_no_error() {
    let Some(scene) = Scene::new("hang", &["fio"]) else { return };
    let _holder = scene.start_holder();
    let mut hanging = scene.start_serving(child::ATTACH);
    let path = hanging.device_path();
    let mut fio = scene.start_fio(&path, "16M");
    std::thread::sleep(Duration::from_millis(500));
    hanging.stop();
    let asked = Instant::now();
    let mut successor = scene.start_serving(child::RESUME);
    assert_eq!(successor.device_path(), path);
    assert!(asked.elapsed() >= Duration::from_millis(1900), "it had two seconds to leave");
    assert!(!hanging.is_running(), "the holder ended it");
    assert!(fio.is_running(), "fio still runs, else this proves nothing");
    fio.finish();
    successor.say("detach");
    scene.assert_nothing_left();
}

#[test]
fn a_killed_holder_costs_nothing_and_its_successor_hands_over_too() {
    let Some(scene) = Scene::new("holder_killed", &["fio"]) else { return };
    let mut holder = scene.start_holder();
    let mut serving = scene.start_serving(child::ATTACH);
    let path = serving.device_path();
    let mut fio = scene.start_fio(&path, "24M");
    holder.kill();
    let _holder = scene.start_holder();
    let client = scene.holder_client();
    let asked = Instant::now();
    while client.list().unwrap().is_empty() {
        assert!(asked.elapsed() < Duration::from_secs(20), "the device is put again");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(fio.is_running(), "fio still runs, else this proves nothing");
    serving.kill();
    serving = scene.start_serving(child::RESUME);
    assert_eq!(serving.device_path(), path);
    fio.finish();
    serving.say("detach");
    scene.assert_nothing_left();
}

#[test]
fn a_mounted_file_system_lives_through_a_take_over() {
    let Some(scene) = Scene::new("take_over_fs", &["mkfs.ext4", "fsck.ext4"]) else { return };
    let _holder = scene.start_holder();
    let mut serving = scene.start_serving(child::ATTACH);
    let path = serving.device_path();
    run("mkfs.ext4", &["-q", "-F", path.to_str().unwrap()]);
    {
        let mounted = scene.mount_fs("ext4", &path);
        for round in 0..3u8 {
            let content = vec![round; 2_000_000];
            let file = mounted.path.join(format!("file{round}"));
            let writer = std::thread::spawn({
                let (file, content) = (file.clone(), content.clone());
                move || {
                    std::fs::write(&file, &content).unwrap();
                    std::fs::File::open(&file).unwrap().sync_all().unwrap();
                }
            });
            serving.kill();
            serving = scene.start_serving(child::RESUME);
            writer.join().unwrap();
            assert!(std::fs::read(&file).unwrap() == content);
        }
    }
    run("fsck.ext4", &["-fn", path.to_str().unwrap()]);
    serving.say("detach");
    scene.assert_nothing_left();
}

#[test]
fn a_dead_mount_is_seen_cleared_and_replaced() {
    let Some(scene) = Scene::new("dead_mount", &[]) else { return };
    let mut serving = scene.start_serving(child::ATTACH_WITHOUT_HOLDER);
    let patience = Duration::from_secs(5);
    let path = serving.device_path();
    assert_eq!(mounts::probe(&scene.fuse, patience).unwrap(), MountState::Live);
    serving.stop();
    assert_eq!(mounts::probe(&scene.fuse, Duration::from_millis(300)).unwrap(), MountState::Stalled);
    serving.kill();
    assert_eq!(mounts::probe(&scene.fuse, patience).unwrap(), MountState::Dead);
    assert!(std::fs::read(&path).is_err());
    let ram = Arc::new(RamVolume::new(MIB));
    assert!(matches!(scene.attach(ram.clone()), Err(DeviceError::Busy)), "remains are not overlooked");
    device::clear(&scene.volume, &scene.fuse, None).unwrap();
    assert_eq!(mounts::probe(&scene.fuse, patience).unwrap(), MountState::Absent);
    scene.assert_nothing_left();
    let device = scene.attach(ram).unwrap();
    assert_eq!(std::fs::read(device.path()).unwrap().len() as u64, MIB);
    device.detach().unwrap();
    device::clear(&scene.volume, &scene.fuse, None).unwrap();
}

#[test]
fn a_successor_without_a_living_device_is_told_so() {
    let Some(scene) = Scene::new("nothing_to_resume", &[]) else { return };
    let _holder = scene.start_holder();
    let holder = scene.holder_client();
    let spec = scene.spec(Arc::new(RamVolume::new(MIB)));
    assert!(matches!(device::resume(DeviceKind::Auto, spec.clone(), &holder), Err(DeviceError::Gone)));
    let device = device::attach(DeviceKind::Auto, spec.clone(), Some(&holder)).unwrap();
    assert_eq!(holder.list().unwrap().join(" "), scene.volume);
    device::clear(&scene.volume, &scene.fuse, Some(&holder)).unwrap();
    drop(device);
    assert!(holder.list().unwrap().is_empty());
    assert!(matches!(device::resume(DeviceKind::Auto, spec, &holder), Err(DeviceError::Gone)));
    scene.assert_nothing_left();
}

#[test]
fn a_stalled_volume_is_freed_by_force_with_an_error_to_its_users() {
    let Some(scene) = Scene::new("force", &["dd"]) else { return };
    let deaf = Arc::new(Deaf::default());
    let device = scene.attach(deaf.clone()).unwrap();
    let from = format!("if={}", device.path().display());
    let mut reader =
        Command::new("dd").args([&from, "of=/dev/null", "bs=4096", "count=1", "iflag=direct"]).spawn().unwrap();
    let asked = Instant::now();
    while deaf.heard.load(Ordering::Relaxed) == 0 && asked.elapsed() < Duration::from_secs(20) {
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(reader.try_wait().unwrap().is_none(), "the reader hangs");
    device.force_detach().unwrap();
    assert!(!reader.wait().unwrap().success(), "the reader got an error");
    scene.assert_nothing_left();
}

#[test]
fn a_superseded_process_tells_its_owner_and_answers_the_kernel_nothing() {
    let Some(scene) = Scene::new("superseded", &["dd"]) else { return };
    let told = Arc::new(AtomicUsize::new(0));
    let mut spec = scene.spec(Arc::new(Superseding));
    spec.on_superseded = Arc::new({
        let told = told.clone();
        move || {
            told.fetch_add(1, Ordering::Relaxed);
        }
    });
    let device = device::attach(DeviceKind::Fuse, spec, None).unwrap();
    let from = format!("if={}", device.path().display());
    let mut reader =
        Command::new("dd").args([&from, "of=/dev/null", "bs=64k", "count=8", "iflag=direct"]).spawn().unwrap();
    let asked = Instant::now();
    while told.load(Ordering::Relaxed) == 0 && asked.elapsed() < Duration::from_secs(20) {
        std::thread::sleep(Duration::from_millis(10));
    }
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(told.load(Ordering::Relaxed), 1, "told once");
    assert!(reader.try_wait().unwrap().is_none(), "no answer, not even an error");
    device.force_detach().unwrap();
    assert!(!reader.wait().unwrap().success());
    scene.assert_nothing_left();
}

#[test]
fn kinds_that_are_not_there_yet_say_so() {
    let Some(scene) = Scene::new("kinds", &[]) else { return };
    for (word, kind) in [("nbd", DeviceKind::Nbd), ("ublk", DeviceKind::Ublk)] {
        assert_eq!(word.parse::<DeviceKind>().unwrap(), kind);
        let refused = device::attach(kind, scene.spec(Arc::new(RamVolume::new(MIB))), None);
        let refusal = refused.err().unwrap();
        assert!(matches!(refusal, DeviceError::NotYet(_)) && refusal.to_string().contains("not yet"));
    }
    assert!("floppy".parse::<DeviceKind>().is_err());
    let mut spec = scene.spec(Arc::new(RamVolume::new(MIB)));
    spec.volume = "a/b".into();
    assert!(matches!(device::attach(DeviceKind::Auto, spec, None).err(), Some(DeviceError::BadHandle)));
}

#[test]
#[ignore = "what a child process of the other tests runs"]
fn child_process() {
    child::main();
}
