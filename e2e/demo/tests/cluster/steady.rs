//! Steady I/O, counted at the sockets and at the API server: it is between driver and storage servers alone.

use std::collections::BTreeMap;
use std::process::Command;
use std::time::{Duration, Instant};

use lamina_demo::kube::{self, NAMESPACE};

use crate::faults::daemon;
use crate::load::Load;
use crate::stage::Stage;

/// For so long nothing is said. Kubernetes looks at volumes once a minute, with I/O and without, and space in use is told
/// once a minute: whatever I/O itself sent would be in each of some windows of this length.
const WINDOW: Duration = Duration::from_secs(12);
const WINDOWS: u32 = 12;

/// Bytes sent over each connection of a pod, by its two ends.
fn sent(stage: &Stage, pod: &lamina_demo::objects::Pod) -> BTreeMap<(String, String), u64> {
    let pid = kube::processes(&stage.cluster, pod).unwrap()[0].to_string();
    let ss = ["-t", pid.as_str(), "-n", "ss", "-tinHO", "state", "established"];
    let output = Command::new("nsenter").args(ss).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    let one = |line: &str| {
        let ends = line.split_whitespace().skip(2).collect::<Vec<_>>();
        let bytes = line.split_whitespace().find_map(|word| word.strip_prefix("bytes_sent:")?.parse().ok());
        ((ends[0].to_owned(), ends[1].to_owned()), bytes.unwrap_or(0))
    };
    text.lines().map(one).collect()
}

/// Addresses of the pods of a component.
fn addresses(stage: &Stage, component: &str) -> Vec<String> {
    let words = format!(
        "-n {NAMESPACE} get pods -l app.kubernetes.io/component={component} -o jsonpath={{.items[*].status.podIP}}"
    );
    stage.kubectl(&words).split(' ').map(str::to_owned).collect()
}

/// Requests for Lamina's objects that the API server ever took, by resource and verb; a watch is one for as long as it lasts.
fn requests(stage: &Stage) -> BTreeMap<String, u64> {
    let metrics = stage.kubectl("get --raw /metrics");
    let ours = metrics.lines().filter(|line| {
        line.starts_with("apiserver_request_total{")
            && line.contains("group=\"lamina.dev\"")
            && !line.contains("verb=\"WATCH\"")
    });
    let one = |line: &str| line.rsplit_once(' ').map(|(what, count)| (what.to_owned(), count.parse().unwrap()));
    ours.filter_map(one).collect()
}

/// What was sent in one window.
struct Seen {
    /// Bytes from the driver to storage servers.
    data: u64,
    /// Connections of the driver to operators and the API server.
    watched: usize,
    /// What else was sent, in words.
    other: Vec<String>,
}

fn look(stage: &Stage, csi_node: &lamina_demo::objects::Pod, servers: &[String], operators: &[String]) -> Seen {
    let to_any_of = |all: &[String], peer: &str| all.iter().any(|ip| peer.starts_with(&format!("{ip}:")));
    let (before, first) = (requests(stage), sent(stage, csi_node));
    assert!(!before.is_empty(), "the API server counts its requests");
    let start = Instant::now();
    stage.await_that("a while", 60, || start.elapsed() > WINDOW);
    let (last, after) = (sent(stage, csi_node), requests(stage));
    let mut seen = Seen { data: 0, watched: 0, other: Vec::new() };
    for ((own, peer), bytes) in &last {
        let more = bytes - first.get(&(own.clone(), peer.clone())).copied().unwrap_or(0);
        if to_any_of(servers, peer) {
            seen.data += more;
        } else if to_any_of(operators, peer) || peer.ends_with(":443") {
            seen.watched += 1;
            seen.other.extend((more > 0).then(|| format!("{more} bytes from {own} to {peer}")));
        }
    }
    let news = after.iter().filter(|(what, count)| before.get(*what) != Some(count));
    seen.other.extend(news.map(|(what, count)| format!("{what} is {count}, was {:?}", before.get(what))));
    seen
}

pub(crate) fn io_is_between_driver_and_servers_alone(stage: &Stage) {
    let load = Load::start(stage, "steady", "n2");
    let csi_node = daemon(stage, "csi-node", "n2").unwrap();
    let (servers, operators) = (addresses(stage, "storage-node"), addresses(stage, "operator"));
    assert!(servers.len() == 3 && operators.len() == 2, "{servers:?} {operators:?}");
    // All pages are there, and every word about them was said.
    load.await_rounds(2);
    let mut all = Vec::new();
    for _ in 0..WINDOWS {
        let seen = look(stage, &csi_node, &servers, &operators);
        assert!(seen.data > 1 << 20, "fio writes: {} bytes", seen.data);
        assert!(seen.watched > 0, "it has a connection to the operator or the API server");
        println!("{} bytes to storage servers; else {:?}", seen.data, seen.other);
        if seen.other.is_empty() {
            return load.end();
        }
        all.push(seen.other);
    }
    panic!("steady I/O sends nothing to the operator or the API server: {all:#?}");
}
