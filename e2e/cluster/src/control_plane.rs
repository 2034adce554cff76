//! etcd, kube-apiserver, controller manager and scheduler in the control plane's namespace.
//!
//! Invariant: each starts only once what it needs answers; what runs already is left alone. etcd runs with `--unsafe-no-fsync`:
//! a crash of the machine loses the cluster, and every figure measured on it has to say so.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::host::{run, wait_until};
use crate::layout::{Layout, Place, Tools};
use crate::process::{self, Daemon, ProcessError};

/// Its daemons in the order of their start.
pub const DAEMONS: [&str; 4] = ["etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler"];

/// The network of Service addresses; nothing routes there but [`crate::network::SERVICE_ADDRESS`].
const SERVICES: &str = "10.96.0.0/16";

/// Starts what does not run and waits until the API server says it is ready.
///
/// # Errors
/// A daemon does not start or ends by itself, or the API server is not ready after 90 s.
pub fn start(layout: &Layout, tools: &Tools) -> Result<(), ProcessError> {
    launch(layout, tools, DAEMONS[0], etcd(layout))?;
    launch(layout, tools, DAEMONS[1], api_server(layout))?;
    await_ready(layout, tools)?;
    launch(layout, tools, DAEMONS[2], controller_manager(layout))?;
    launch(layout, tools, DAEMONS[3], scheduler(layout))
}

fn launch(layout: &Layout, tools: &Tools, name: &str, flags: Vec<String>) -> Result<(), ProcessError> {
    let argv = std::iter::once(tools.path(name)).chain(flags).collect();
    process::start(layout, tools, &Daemon { place: Place::ControlPlane, name, argv })
}

fn await_ready(layout: &Layout, tools: &Tools) -> Result<(), ProcessError> {
    let config = format!("--kubeconfig={}", layout.kubeconfig().display());
    let server = std::net::SocketAddr::from((layout.control_plane_address(), 443));
    wait_until("the API server to be ready", Duration::from_secs(90), || {
        process::expect_alive(layout, Place::ControlPlane, DAEMONS[0])?;
        process::expect_alive(layout, Place::ControlPlane, DAEMONS[1])?;
        // A connection first: kubectl is far dearer to start.
        let open = std::net::TcpStream::connect_timeout(&server, Duration::from_millis(500)).is_ok();
        Ok(open && run(&[&tools.path("kubectl"), &config, "--request-timeout=2s", "get", "--raw", "/readyz"]).is_ok())
    })
}

/// When each node last said how it is, in the API server's words; empty for one that is not there.
///
/// # Errors
/// The API server does not answer.
pub fn heartbeats(layout: &Layout, tools: &Tools) -> Result<BTreeMap<String, String>, ProcessError> {
    let seen = readiness(layout, tools)?;
    Ok(seen.into_iter().map(|(name, (_, at))| (name, at)).collect())
}

/// Waits until all nodes that are on are Ready, by a word of theirs that is not among `stale`.
///
/// # Errors
/// They are not after 120 s, or a kubelet ended by itself.
pub fn await_nodes(layout: &Layout, tools: &Tools, stale: &BTreeMap<String, String>) -> Result<(), ProcessError> {
    let on: Vec<Place> = layout.node_ids().map(Place::Node).filter(|place| is_on(layout, *place)).collect();
    wait_until("the nodes to be Ready", Duration::from_secs(120), || {
        for place in &on {
            process::expect_alive(layout, *place, "kubelet")?;
        }
        let seen = readiness(layout, tools)?;
        let fresh = |place: &Place| {
            let name = place.to_string();
            seen.get(&name).is_some_and(|(ready, at)| ready == "True" && stale.get(&name) != Some(at))
        };
        let all = on.iter().all(fresh);
        if !all {
            std::thread::sleep(Duration::from_millis(300));
        }
        Ok(all)
    })
}

/// Waits until pods can be made: the controller manager gives each namespace its service account.
///
/// # Errors
/// There is none after 60 s.
pub fn await_service_account(layout: &Layout, tools: &Tools) -> Result<(), ProcessError> {
    let config = format!("--kubeconfig={}", layout.kubeconfig().display());
    let kubectl = tools.path("kubectl");
    let words = [kubectl.as_str(), &config, "get", "serviceaccount", "default"];
    wait_until("the default service account", Duration::from_secs(60), || {
        process::expect_alive(layout, Place::ControlPlane, DAEMONS[2])?;
        Ok(run(&words).is_ok())
    })
}

fn is_on(layout: &Layout, place: Place) -> bool {
    process::pid_of(layout, place, process::HOLDER).is_some()
}

/// Per node the status of its condition Ready and when that was last said.
fn readiness(layout: &Layout, tools: &Tools) -> Result<BTreeMap<String, (String, String)>, ProcessError> {
    const LINES: &str = r#"jsonpath={range .items[*]}{.metadata.name}{range .status.conditions[?(@.type=="Ready")]} {.status} {.lastHeartbeatTime}{end}{"\n"}{end}"#;
    let config = format!("--kubeconfig={}", layout.kubeconfig().display());
    let text = run(&[&tools.path("kubectl"), &config, "get", "nodes", "-o", LINES])?;
    let read = |line: &str| {
        let mut words = line.split_whitespace().map(str::to_owned);
        Some((words.next()?, (words.next()?, words.next()?)))
    };
    Ok(text.lines().filter_map(read).collect())
}

fn etcd(layout: &Layout) -> Vec<String> {
    let data = layout.place_dir(Place::ControlPlane).join("etcd");
    flags(&[
        ("data-dir", &data.display().to_string()),
        ("listen-client-urls", "http://127.0.0.1:2379"),
        ("advertise-client-urls", "http://127.0.0.1:2379"),
        ("listen-peer-urls", "http://127.0.0.1:2380"),
        ("log-level", "warn"),
        ("unsafe-no-fsync", "true"),
    ])
}

fn api_server(layout: &Layout) -> Vec<String> {
    let file = |name: &str| layout.pki().join(name).display().to_string();
    flags(&[
        ("etcd-servers", "http://127.0.0.1:2379"),
        ("advertise-address", &layout.control_plane_address().to_string()),
        ("bind-address", "0.0.0.0"),
        ("secure-port", "443"),
        ("service-cluster-ip-range", SERVICES),
        ("tls-cert-file", &file("apiserver.crt")),
        ("tls-private-key-file", &file("apiserver.key")),
        ("client-ca-file", &file("ca.crt")),
        ("kubelet-certificate-authority", &file("ca.crt")),
        ("kubelet-client-certificate", &file("apiserver-to-kubelet.crt")),
        ("kubelet-client-key", &file("apiserver-to-kubelet.key")),
        // Node names do not resolve here: without this, logs and exec fail.
        ("kubelet-preferred-address-types", "InternalIP"),
        ("service-account-issuer", "https://kubernetes.default.svc"),
        ("service-account-key-file", &file("service-accounts.pub")),
        ("service-account-signing-key-file", &file("service-accounts.key")),
        ("authorization-mode", "Node,RBAC"),
        ("enable-admission-plugins", "NodeRestriction"),
        ("allow-privileged", "true"),
        ("enable-priority-and-fairness", "true"),
    ])
}

fn controller_manager(layout: &Layout) -> Vec<String> {
    let file = |name: &str| layout.pki().join(name).display().to_string();
    flags(&[
        ("kubeconfig", &file("controller-manager.kubeconfig")),
        ("root-ca-file", &file("ca.crt")),
        ("service-account-private-key-file", &file("service-accounts.key")),
        ("use-service-account-credentials", "true"),
        ("leader-elect", "false"),
        ("bind-address", "127.0.0.1"),
        // Its usual place is a folder of the machine, which it would make.
        ("flex-volume-plugin-dir", &layout.place_dir(Place::ControlPlane).join("flex").display().to_string()),
        // A node is NotReady 10 s after its last word (the kubelet renews every 2 s), not 50 s: the tests wait for it.
        ("node-monitor-period", "1s"),
        ("node-monitor-grace-period", "10s"),
    ])
}

fn scheduler(layout: &Layout) -> Vec<String> {
    let config = layout.pki().join("scheduler.kubeconfig").display().to_string();
    flags(&[("kubeconfig", &config), ("leader-elect", "false"), ("bind-address", "127.0.0.1")])
}

fn flags(pairs: &[(&str, &str)]) -> Vec<String> {
    pairs.iter().map(|(name, value)| format!("--{name}={value}")).collect()
}
