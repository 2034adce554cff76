//! The cluster's network: a namespace per place, one bridge in the control plane's namespace, a cable (veth pair) from each node
//! and one from the machine itself, routes to every node's pods.
//!
//! ```text
//!   machine ── lam0-host ─┐
//!                         ├─ br0 (10.89.slot.1) in the control plane's namespace; 10.96.0.1 is on its lo
//!   n1 eth0 ── n1 ────────┤
//!   n2 eth0 ── n2 ────────┘      cut: the port moves to another bridge without an address, so the cable stays
//!                                 "up" and frames just stop arriving, as with a real partition
//! ```
//!
//! Invariant: all interfaces but one end of the machine's cable live in our namespaces and vanish with them.

use crate::host::{HostError, run};
use crate::layout::{Layout, NodeId, Place};

/// The API server's address for pods, on the loopback of the control plane's namespace: what a Service would be with kube-proxy.
pub const SERVICE_ADDRESS: &str = "10.96.0.1";

const MAIN_BRIDGE: &str = "br0";

/// Says on a namespace's `lo` that all in it was made: a crash leaves it unsaid, and the next `up` begins it anew.
const COMPLETE: &str = "lamina-complete";

/// Makes all that is missing of namespaces, bridge, cables and routes. A control plane made anew takes all nodes with it, as
/// their cables end there.
///
/// # Errors
/// A namespace or interface cannot be made.
pub fn make(layout: &Layout) -> Result<(), HostError> {
    let there = all_namespaces()?;
    let anew = !is_complete(layout, Place::ControlPlane, &there)?;
    if anew {
        add_namespace(layout, Place::ControlPlane, &there)?;
        make_bridge(layout)?;
        connect_host(layout)?;
        complete(layout, Place::ControlPlane)?;
    }
    for node in layout.node_ids() {
        let place = Place::Node(node);
        if anew || !is_complete(layout, place, &there)? {
            add_namespace(layout, place, &there)?;
            connect_node(layout, node)?;
            complete(layout, place)?;
        }
    }
    Ok(())
}

fn is_complete(layout: &Layout, place: Place, there: &[String]) -> Result<bool, HostError> {
    let name = layout.name_of(place);
    Ok(there.contains(&name) && run(&["ip", "-n", &name, "link", "show", "dev", "lo"])?.contains(COMPLETE))
}

fn complete(layout: &Layout, place: Place) -> Result<(), HostError> {
    run(&["ip", "-n", &layout.name_of(place), "link", "set", "dev", "lo", "alias", COMPLETE]).map(drop)
}

/// A new namespace; a half-made one of that name goes first.
fn add_namespace(layout: &Layout, place: Place, there: &[String]) -> Result<(), HostError> {
    let name = layout.name_of(place);
    if there.contains(&name) {
        run(&["ip", "netns", "del", &name])?;
    }
    run(&["ip", "netns", "add", &name]).map(drop)
}

/// Removes the namespaces and the machine's end of its cable, whatever is there of them.
///
/// # Errors
/// The kernel refuses a removal.
pub fn remove(slot: u8) -> Result<(), HostError> {
    let interface = Layout { dir: "/".into(), slot, nodes: 0 }.host_interface();
    remove_link(&[], &interface)?;
    for name in namespaces_of(slot)? {
        run(&["ip", "netns", "del", &name])?;
    }
    Ok(())
}

/// The network namespaces of a slot's cluster.
///
/// # Errors
/// They cannot be listed.
pub fn namespaces_of(slot: u8) -> Result<Vec<String>, HostError> {
    let prefix = format!("lamina{slot}-");
    Ok(all_namespaces()?.into_iter().filter(|name| name.starts_with(&prefix)).collect())
}

/// Cuts these nodes off from everyone else; among themselves they still talk. A node alone is cut off from all.
///
/// # Errors
/// The cable or bridge is not there.
pub fn cut(layout: &Layout, nodes: &[NodeId]) -> Result<(), HostError> {
    let Some(first) = nodes.first() else { return Ok(()) };
    let bridge = format!("cut-{first}");
    if !ports(layout)?.iter().any(|port| port.name == bridge) {
        in_control_plane(layout, &["link", "add", &bridge, "type", "bridge"])?;
        in_control_plane(layout, &["link", "set", &bridge, "up"])?;
    }
    for node in nodes {
        in_control_plane(layout, &["link", "set", &node.to_string(), "master", &bridge])?;
    }
    remove_empty_bridges(layout)
}

/// Puts these nodes' cables back.
///
/// # Errors
/// The cable or bridge is not there.
pub fn heal(layout: &Layout, nodes: &[NodeId]) -> Result<(), HostError> {
    for node in nodes {
        in_control_plane(layout, &["link", "set", &node.to_string(), "master", MAIN_BRIDGE])?;
    }
    remove_empty_bridges(layout)
}

/// The nodes that are cut off now.
///
/// # Errors
/// The control plane's namespace is not there.
pub fn cut_off(layout: &Layout) -> Result<Vec<NodeId>, HostError> {
    let ports = ports(layout)?;
    let is_cut = |node: &NodeId| {
        let name = node.to_string();
        ports.iter().any(|port| port.name == name && port.bridge.as_deref().is_some_and(|bridge| bridge != MAIN_BRIDGE))
    };
    Ok(layout.node_ids().filter(is_cut).collect())
}

fn make_bridge(layout: &Layout) -> Result<(), HostError> {
    let service = format!("{SERVICE_ADDRESS}/32");
    let address = format!("{}/24", layout.control_plane_address());
    in_control_plane(layout, &["link", "set", "lo", "up"])?;
    in_control_plane(layout, &["addr", "add", &service, "dev", "lo"])?;
    in_control_plane(layout, &["link", "add", MAIN_BRIDGE, "type", "bridge"])?;
    in_control_plane(layout, &["addr", "add", &address, "dev", MAIN_BRIDGE])?;
    in_control_plane(layout, &["link", "set", MAIN_BRIDGE, "up"])?;
    for node in layout.node_ids() {
        let via = layout.node_address(node).to_string();
        in_control_plane(layout, &["route", "add", &layout.pods_of(node), "via", &via])?;
    }
    forward(layout, Place::ControlPlane)
}

fn connect_host(layout: &Layout) -> Result<(), HostError> {
    let (interface, space) = (layout.host_interface(), layout.name_of(Place::ControlPlane));
    remove_link(&[], &interface)?;
    let address = format!("{}/24", layout.host_address());
    let via = layout.control_plane_address().to_string();
    run(&["ip", "link", "add", &interface, "type", "veth", "peer", "name", "host", "netns", &space])?;
    run(&["ip", "addr", "add", &address, "dev", &interface])?;
    run(&["ip", "link", "set", &interface, "up"])?;
    in_control_plane(layout, &["link", "set", "host", "master", MAIN_BRIDGE, "up"])?;
    run(&["ip", "route", "add", &layout.all_pods(), "via", &via, "dev", &interface])?;
    Ok(())
}

fn connect_node(layout: &Layout, node: NodeId) -> Result<(), HostError> {
    let (port, space) = (node.to_string(), layout.name_of(Place::Node(node)));
    let inside = |words: &[&str]| run(&[&["ip", "-n", &space], words].concat());
    remove_link(&["-n", &layout.name_of(Place::ControlPlane)], &port)?;
    in_control_plane(layout, &["link", "add", &port, "type", "veth", "peer", "name", "eth0", "netns", &space])?;
    in_control_plane(layout, &["link", "set", &port, "master", MAIN_BRIDGE, "up"])?;
    inside(&["link", "set", "lo", "up"])?;
    inside(&["addr", "add", &format!("{}/24", layout.node_address(node)), "dev", "eth0"])?;
    inside(&["link", "set", "eth0", "up"])?;
    inside(&["route", "add", "default", "via", &layout.control_plane_address().to_string()])?;
    // Straight to the other nodes, so that nodes cut off together still reach each other's pods.
    for other in layout.node_ids().filter(|other| *other != node) {
        inside(&["route", "add", &layout.pods_of(other), "via", &layout.node_address(other).to_string()])?;
    }
    forward(layout, Place::Node(node))
}

/// A namespace ends a little after its name is gone, and its cables with it: one of that name may still be there.
fn remove_link(space: &[&str], interface: &str) -> Result<(), HostError> {
    let show = [&["ip"], space, &["-o", "link", "show", "dev", interface]].concat();
    if run(&show).is_err() {
        return Ok(());
    }
    let deleted = run(&[&["ip"], space, &["link", "del", interface]].concat());
    // It may have gone by itself in between.
    if run(&show).is_err() { Ok(()) } else { deleted.map(drop) }
}

fn forward(layout: &Layout, place: Place) -> Result<(), HostError> {
    let space = format!("--net=/run/netns/{}", layout.name_of(place));
    run(&["nsenter", &space, "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward"]).map(drop)
}

struct Port {
    name: String,
    bridge: Option<String>,
}

fn ports(layout: &Layout) -> Result<Vec<Port>, HostError> {
    let text = in_control_plane(layout, &["-o", "link", "show"])?;
    Ok(text.lines().filter_map(read_port).collect())
}

/// One line of `ip -o link`: `4: n1@if2: <…> mtu 1500 … master br0 state UP …`.
fn read_port(line: &str) -> Option<Port> {
    let mut words = line.split_whitespace();
    let name = words.nth(1)?.trim_end_matches(':');
    let name = name.split('@').next()?.to_owned();
    let bridge = words.skip_while(|word| *word != "master").nth(1).map(str::to_owned);
    Some(Port { name, bridge })
}

fn remove_empty_bridges(layout: &Layout) -> Result<(), HostError> {
    let ports = ports(layout)?;
    for bridge in ports.iter().map(|port| &port.name).filter(|name| name.starts_with("cut-")) {
        if !ports.iter().any(|port| port.bridge.as_ref() == Some(bridge)) {
            in_control_plane(layout, &["link", "del", bridge])?;
        }
    }
    Ok(())
}

fn in_control_plane(layout: &Layout, words: &[&str]) -> Result<String, HostError> {
    let space = layout.name_of(Place::ControlPlane);
    run(&[&["ip", "-n", &space], words].concat())
}

fn all_namespaces() -> Result<Vec<String>, HostError> {
    let text = run(&["ip", "netns", "list"])?;
    Ok(text.lines().filter_map(|line| line.split_whitespace().next()).map(str::to_owned).collect())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_port_is_read_with_its_bridge() {
        let line = "4: n1@if2: <BROADCAST,UP> mtu 1500 qdisc noqueue master br0 state UP mode DEFAULT";
        let port = read_port(line).unwrap();
        assert_eq!((port.name.as_str(), port.bridge.as_deref()), ("n1", Some("br0")));
        let alone = read_port("1: lo: <LOOPBACK> mtu 65536 qdisc noop state DOWN").unwrap();
        assert_eq!((alone.name.as_str(), alone.bridge), ("lo", None));
    }
}
