//! A node that was out of hand, or cut off, while its volume went on elsewhere: nothing of it counts any more.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use lamina_cluster::NodeId;
use lamina_cluster::host::run;
use lamina_demo::kube;
use lamina_demo::objects::Pod;
use serde_json::Value;

use crate::faults::{Cut, OutOfService, Stopped, StoppedKubelet, daemon, node_without_operator};
use crate::manifests::{claim, pod};
use crate::stage::Stage;

/// protocol.md §2.8: how long a driver may trust what it was last served.
const READ_LEASE: Duration = Duration::from_secs(5);
/// What the look at the API server from outside may be late.
const SLACK: Duration = Duration::from_millis(700);

/// A set of one pod with the raw volume as /dev/data, so that Kubernetes itself starts it elsewhere.
const SET: &str = "apiVersion: apps/v1
kind: StatefulSet
metadata: {name: old}
spec:
  serviceName: old
  replicas: 1
  selector: {matchLabels: {app: old}}
  template:
    metadata: {labels: {app: old}}
    spec:
      terminationGracePeriodSeconds: 1
      containers:
      - name: c
        image: lamina.dev/busybox:1
        imagePullPolicy: Never
        command: [sleep, \"100000\"]
        volumeDevices: [{name: data, devicePath: /dev/data}]
      volumes: [{name: data, persistentVolumeClaim: {claimName: old}}]
";

/// Writes 64 KiB at a time past the page cache all over the device, for ever, and notes each write that came back. The
/// device is held open, as its number would otherwise go to the next volume of this machine.
const WRITER: &str = "exec 3</dev/data; i=0; while true; do i=$((i + 1)); \
    yes \"old $i\" | head -c 65536 > /tmp/x; \
    if dd if=/tmp/x of=/dev/data bs=64k seek=$((i % 512)) oflag=direct conv=notrunc 2>/tmp/e; \
    then echo \"$i written\"; else echo \"$i failed\"; sleep 1; fi >> /tmp/log; done";

const SUM: &str = "dd if=/dev/data bs=1M iflag=direct 2>/dev/null | sha256sum";

/// The container of a pod that Kubernetes may have forgotten, entered past it.
struct Container(i32);

impl Container {
    fn of(stage: &Stage, pod: &Pod) -> Self {
        Self(*kube::processes(&stage.cluster, pod).unwrap().first().expect("the pod runs"))
    }

    fn sh(&self, script: &str) -> Result<String, lamina_cluster::host::HostError> {
        run(&["nsenter", "--mount", "--target", &self.0.to_string(), "/bin/sh", "-c", script])
    }

    /// Lines of the writer's log with this word.
    fn count(&self, word: &str) -> u32 {
        self.sh(&format!("cat /tmp/log 2>/dev/null | grep -c {word} || true")).unwrap().trim().parse().unwrap()
    }
}

pub(crate) fn stopped(stage: &Stage) {
    let text = claim("old", "64Mi", "Block", "lamina-demo") + SET;
    stage.cluster.apply(&text).unwrap();
    let old = stage.await_pod("old-0", "");
    let node: NodeId = old.spec.node_name.parse().unwrap();
    let handle = kube::volume_of_claim(&stage.cluster, "old").unwrap().status.volume_id;
    let container = Container::of(stage, &old);
    stage.sh("old-0", &format!("({WRITER}) </dev/null >/dev/null 2>&1 &")).unwrap();
    stage.await_that("writes", 30, || container.count("written") > 20);

    let of =
        |component| kube::processes(&stage.cluster, &daemon(stage, component, &old.spec.node_name).unwrap()).unwrap();
    let (plugin, holder) = (of("csi-node"), of("device-holder"));
    let kubelet = StoppedKubelet::new(stage, node);
    let programs = Stopped::new([plugin, holder].concat());
    stage.kubectl(&format!("wait --for=condition=Ready=Unknown node/{node} --timeout=60s"));
    let out = OutOfService::new(stage, node);
    let new = stage.await_pod("old-0", &old.metadata.uid);
    assert_ne!(new.spec.node_name, old.spec.node_name, "it runs elsewhere");

    let fill = "yes new | head -c 16777216 > /tmp/new && dd if=/tmp/new of=/dev/data bs=1M oflag=direct conv=notrunc";
    stage.sh("old-0", fill).unwrap();
    let sum = stage.sh("old-0", SUM).unwrap();
    let written = container.count("written");
    assert_eq!(container.count("failed"), 0, "while it is stopped, nothing fails either");

    drop(programs);
    stage.await_that("the old writer to be refused", 60, || container.count("failed") >= 3);
    assert_eq!(container.count("written"), written, "no write of the old one came back as done");
    let read = container.sh("dd if=/dev/data of=/dev/null bs=4k count=1 iflag=direct 2>&1");
    assert!(read.is_err(), "a read of the old one fails: {read:?}");
    assert_eq!(stage.sh("old-0", SUM).unwrap(), sum, "not one byte of the old one landed");
    drop(kubelet);
    stage.await_that("the old node to have taken down its device", 90, || devices(&handle).len() == 1);
    assert_eq!(stage.sh("old-0", SUM).unwrap(), sum);
    drop(out);
    stage.calm();
}

/// The loop devices over a volume's file, on whatever node: they are machine-wide.
fn devices(handle: &str) -> Vec<PathBuf> {
    let all = std::fs::read_dir("/sys/block").unwrap().flatten();
    let over = |entry: &std::fs::DirEntry| {
        let file = std::fs::read_to_string(entry.path().join("loop/backing_file")).unwrap_or_default();
        // Named after volume and node.
        file.rsplit('/').next().is_some_and(|name| name.starts_with(handle))
    };
    all.filter(over).map(|entry| PathBuf::from("/dev").join(entry.file_name())).collect()
}

/// Reads of a device past every cache, one after the other, until told to stop.
struct Reader {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Vec<(Instant, bool)>>,
}

impl Reader {
    fn start(device: &std::path::Path) -> Self {
        const DIRECT: i32 = 0o40000;
        let file = OpenOptions::new().read(true).custom_flags(DIRECT).open(device).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let told = stop.clone();
        Self { stop, thread: std::thread::spawn(move || read_on(&file, &told)) }
    }

    /// When each read came back, and whether with data.
    fn end(self) -> Vec<(Instant, bool)> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

fn read_on(file: &File, stop: &AtomicBool) -> Vec<(Instant, bool)> {
    let mut seen = Vec::new();
    let mut space = vec![0_u8; 8192];
    let skip = space.as_ptr().align_offset(4096);
    for number in 0_u64.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        // Over the first 2 MiB, so in both groups.
        let done = file.read_exact_at(&mut space[skip..skip + 4096], number * 65536 % (2 << 20)).is_ok();
        seen.push((Instant::now(), done));
        // sleep: a reader that takes the machine from the programs it watches would change what it sees
        std::thread::sleep(Duration::from_millis(20));
    }
    seen
}

pub(crate) fn cut_off(stage: &Stage) {
    let node = node_without_operator(stage);
    let place = node.to_string();
    stage.cluster.apply(&(claim("cut", "64Mi", "Block", "lamina-demo") + &pod("cut", "cut", true, &place))).unwrap();
    stage.await_pod("cut", "");
    stage.sh("cut", "dd if=/dev/urandom of=/dev/data bs=1M count=4 oflag=direct conv=notrunc").unwrap();
    let volume = kube::volume_of_claim(&stage.cluster, "cut").unwrap();
    let near = kube::servers(&stage.cluster).unwrap().into_iter().find(|one| one.metadata.name == place).unwrap();
    let copies = volume.members_on(&near.status.server_id).count();
    assert_eq!(copies, 2, "both groups have a copy on the node that is cut off: {}", volume.in_short());
    let device = devices(&volume.status.volume_id).pop().unwrap();
    let reader = Reader::start(&device);
    // sleep: reads before the cut, as those of any consumer
    std::thread::sleep(Duration::from_secs(1));

    let cut_at = Instant::now();
    let cut = Cut::new(stage, node);
    let other = stage.cluster.layout().node_ids().find(|other| *other != node).unwrap().to_string();
    let out = hand_over(stage, node, &other);
    let (left_out, admitted) = await_admission(stage, &volume.metadata.name, &other);
    stage.await_pod("cut-again", "");
    drop(cut);
    // Its requests end in errors once it hears that its session is over, so the reader comes to an end.
    let seen = reader.end();

    let last = seen.iter().filter(|(_, done)| *done).map(|(at, _)| *at).max().expect("reads before the cut");
    let after = |at: Instant| at.saturating_duration_since(cut_at);
    println!(
        "cut off: last read {:.1} s after the cut, left out after {:.1} s, another admitted after {:.1} s",
        after(last).as_secs_f64(),
        after(left_out).as_secs_f64(),
        after(admitted).as_secs_f64()
    );
    assert!(last > cut_at, "the danger is real: its own storage server went on to serve it");
    assert!(after(last) <= READ_LEASE + SLACK, "it read {:?} after the cut", after(last));
    assert!(last < admitted, "nobody else was admitted while it could read");
    assert!(admitted.duration_since(left_out) + SLACK >= READ_LEASE * 5 / 4, "the lease was waited for");
    stage.sh("cut-again", "dd if=/dev/urandom of=/dev/data bs=1M count=4 oflag=direct conv=notrunc").unwrap();
    drop(out);
    stage.calm();
}

/// Has Kubernetes move the volume at once, not after the time in which a node counts as merely late.
fn hand_over<'a>(stage: &'a Stage, node: NodeId, other: &str) -> OutOfService<'a> {
    let patch =
        r#"{"status":{"conditions":[{"type":"Ready","status":"Unknown","reason":"CutOff","message":"by the test"}]}}"#;
    stage.cluster.kubectl(&["patch", "node", &node.to_string(), "--subresource=status", "-p", patch]).unwrap();
    let out = OutOfService::new(stage, node);
    stage.kubectl("delete pod cut --force --grace-period=0");
    stage.cluster.apply(&pod("cut-again", "cut", true, other)).unwrap();
    out
}

/// When the first map without the unreachable copies was seen, and when the session of another node was admitted.
fn await_admission(stage: &Stage, volume: &str, other: &str) -> (Instant, Instant) {
    let (mut left_out, mut admitted) = (None, None);
    stage.await_that("another session", 90, || {
        let object: Value = kube::get(&stage.cluster, &["volume", volume]).unwrap();
        let now = Instant::now();
        let map = &object["status"]["map"];
        let all = |list: &Value| list.as_array().cloned().unwrap_or_default();
        let groups = all(&map["placements"]).into_iter().flat_map(|placement| all(&placement["groups"]));
        let members = groups.flat_map(|group| all(&group["members"])).collect::<Vec<_>>();
        if members.iter().any(|member| member["unpromised"] == true) {
            left_out.get_or_insert(now);
        }
        let is_other = |one: &Value| one["node"] == *other && one["standing"] == "Admitted";
        if all(&map["sessions"]).iter().any(is_other) {
            admitted.get_or_insert(now);
        }
        admitted.is_some()
    });
    (left_out.expect("a map that left out the unreachable copies without their promise"), admitted.unwrap())
}
