//! Steady I/O, counted at the sockets and at the API server: it is between driver and storage servers alone.

use std::collections::BTreeMap;
use std::process::Command;
use std::time::{Duration, Instant};

use lamina_demo::kube::{self, NAMESPACE};

use crate::faults::daemon;
use crate::load::Load;
use crate::stage::Stage;

/// For so long nothing may be said. No watch is made anew so soon: the API server ends one after five minutes or more.
const COUNTED: Duration = Duration::from_secs(15);

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
/// Apart from them: words about a server's space in use, which follows what was written once within a minute.
fn requests(stage: &Stage) -> (BTreeMap<String, u64>, u64) {
    let metrics = stage.kubectl("get --raw /metrics");
    let ours = metrics.lines().filter(|line| {
        line.starts_with("apiserver_request_total{")
            && line.contains("group=\"lamina.dev\"")
            && !line.contains("verb=\"WATCH\"")
    });
    let one = |line: &str| line.rsplit_once(' ').map(|(what, count)| (what.to_owned(), count.parse().unwrap()));
    let of_space = |(what, _): &(String, u64)| {
        what.contains("resource=\"storageservers\"") && what.contains("subresource=\"status\",verb=\"APPLY\"")
    };
    let (space, rest): (Vec<_>, Vec<_>) = ours.filter_map(one).partition(of_space);
    (rest.into_iter().collect(), space.iter().map(|(_, count)| count).sum())
}

pub(crate) fn io_is_between_driver_and_servers_alone(stage: &Stage) {
    let load = Load::start(stage, "steady", "n2");
    let csi_node = daemon(stage, "csi-node", "n2").unwrap();
    let servers = addresses(stage, "storage-node");
    let operators = addresses(stage, "operator");
    let to_any_of = |all: &[String], peer: &str| all.iter().any(|ip| peer.starts_with(&format!("{ip}:")));
    // All pages are there, and every word about them was said.
    load.await_rounds(2);
    let (mut before, mut since) = (requests(stage), Instant::now());
    stage.await_that("the word about what was attached and written", 120, || {
        let now = requests(stage);
        if now.0 != before.0 {
            (before, since) = (now, Instant::now());
        }
        since.elapsed() > Duration::from_secs(5)
    });
    let first = sent(stage, &csi_node);
    let start = Instant::now();
    stage.await_that("a while", 60, || start.elapsed() > COUNTED);
    load.await_rounds(1);
    let last = sent(stage, &csi_node);
    let (after, words_of_space) = requests(stage);
    assert_eq!(after, before.0, "requests for Lamina's objects that the API server took");
    // One from its server and one from the leader.
    assert!(words_of_space - before.1 <= 2 * servers.len() as u64, "{words_of_space} and {before:?}");
    assert!(!after.is_empty() && !operators.is_empty(), "{after:?} {operators:?}");

    let (mut data, mut other) = (0, Vec::new());
    for ((own, peer), bytes) in &last {
        let more = bytes - first.get(&(own.clone(), peer.clone())).copied().unwrap_or(0);
        if to_any_of(&servers, peer) {
            data += more;
        } else if to_any_of(&operators, peer) || peer.ends_with(":443") {
            other.push(format!("{more} bytes from {own} to {peer}"));
        }
    }
    println!("{data} bytes to storage servers; {other:?}");
    assert!(data > 8 << 20, "fio wrote: {data} bytes");
    assert!(!other.is_empty(), "it has a connection to the operator or the API server: {last:?}");
    assert!(other.iter().all(|one| one.starts_with("0 bytes")), "steady I/O sends nothing to either: {other:?}");
    load.end();
}
