//! What people see of a server: state, space, devices, conditions.
//!
//! Invariant: space follows the leader's steps (1 % of the capacity, or 60 s), so a server that is written to all day costs
//! the API server no more than a write a minute and one for each percent.

use lamina_crds::Id;
use lamina_crds::condition::ConditionStatus;
use lamina_crds::storage_server::{self as server_api, CopyCount, DeviceState, ServerState, ServerSummary};
use lamina_protocol::ids::VolumeId;
use lamina_protocol::management::{Orphan, ServerHealth, ServerView, VetoReason};

use super::{Names, Shown, cut, size, some};
use crate::store::KnownServer;

/// Above this part of the capacity in use, percent, space is said to be low.
const SPACE_LOW_PERCENT: u64 = 90;

/// What is written of a server for people.
#[derive(Clone, Debug, PartialEq)]
pub struct ServerDescription {
    /// In one word.
    pub state: ServerState,
    /// Bytes of its open devices, as its heartbeats say.
    pub capacity_bytes: u64,
    /// Bytes of them in use, as its heartbeats say.
    pub used_bytes: u64,
    /// Bytes promised to copies.
    pub provisioned_bytes: u64,
    /// Copies of committed maps.
    pub copies: CopyCount,
    /// Copies that no object names, or that were kept when another one was forced, 256 at most.
    pub orphans: Vec<server_api::Orphan>,
    /// Why copies cannot be taken away, 64 at most.
    pub vetoes: Vec<server_api::Veto>,
    /// In short.
    pub summary: ServerSummary,
    /// Ready, DevicesReady, Drained, SpaceLow.
    pub conditions: Vec<Shown>,
}

/// What people see of a server. `filling`: (volume, percent) of each copy being filled there; `known`: its object.
pub fn of_server(
    view: &ServerView,
    orphans: &[Orphan],
    filling: &[(VolumeId, i32)],
    known: Option<&KnownServer>,
    names: &dyn Names,
) -> ServerDescription {
    let drain = known.is_some_and(|known| known.object.drain);
    let state = server_state(view, drain);
    let filling_text = filling.iter().map(|(v, percent)| format!("{} {percent}%", names.volume(*v)));
    let filling_text = filling_text.collect::<Vec<_>>().join(", ");
    let doing = match state {
        ServerState::Ready if filling.is_empty() => "serving".to_owned(),
        ServerState::Ready if filling.len() == 1 => "fills 1 copy".to_owned(),
        ServerState::Ready => format!("fills {} copies", filling.len()),
        other => format!("{other:?}").to_lowercase(),
    };
    let message = message(view, orphans, known);
    let conditions =
        vec![ready(state, message.clone()), devices_ready(view, known), drained(view, drain, names), space_low(view)];
    ServerDescription {
        state,
        capacity_bytes: view.capacity_bytes,
        used_bytes: view.used_bytes,
        provisioned_bytes: view.provisioned_bytes,
        copies: CopyCount { serving: view.copies.0.into(), total: view.copies.1.into() },
        orphans: orphans.iter().take(256).map(orphan).collect(),
        vetoes: view.vetoes.iter().take(64).map(|veto| shown_veto(veto, names)).collect(),
        summary: ServerSummary {
            devices: devices(known),
            copies: Some(format!("{}/{}", view.copies.0, view.copies.1)),
            used: used(view),
            doing: some(doing, 128),
            filling: some(filling_text, 512),
            message: message.map(|text| cut(text, 1024)),
        },
        conditions,
    }
}

fn server_state(view: &ServerView, drain: bool) -> ServerState {
    match view.health {
        ServerHealth::Unknown => ServerState::Unknown,
        ServerHealth::Suspected => ServerState::Suspected,
        ServerHealth::Failed => ServerState::Failed,
        ServerHealth::Foreign => ServerState::Foreign,
        ServerHealth::Alive if view.leaving => ServerState::Leaving,
        ServerHealth::Alive if drain && view.copies.1 == 0 => ServerState::Drained,
        ServerHealth::Alive if drain => ServerState::Draining,
        ServerHealth::Alive if view.capacity_bytes == 0 => ServerState::NoDevice,
        ServerHealth::Alive => ServerState::Ready,
    }
}

/// What is wrong, the worst first.
fn message(view: &ServerView, orphans: &[Orphan], known: Option<&KnownServer>) -> Option<String> {
    match view.health {
        ServerHealth::Failed => return Some("does not answer; its copies are left out".to_owned()),
        ServerHealth::Suspected => return Some("silent together with many others".to_owned()),
        ServerHealth::Foreign => return Some("another server or another Lamina answers at its address".to_owned()),
        ServerHealth::Alive | ServerHealth::Unknown => {}
    }
    let broken = known.map(troubles).filter(|text| !text.is_empty());
    let vetoes =
        (!view.vetoes.is_empty()).then(|| format!("{} copies cannot leave: see status.vetoes", view.vetoes.len()));
    let orphans =
        (!orphans.is_empty()).then(|| format!("{} copies that no Volume uses: see status.orphans", orphans.len()));
    let low = is_low(view).then(|| format!("little space: {}", used(view).unwrap_or_default()));
    broken.or(vetoes).or(low).or(orphans)
}

fn devices(known: Option<&KnownServer>) -> Option<String> {
    let devices = &known?.devices;
    let ready = devices.iter().filter(|device| device.state == DeviceState::Ready).count();
    (!devices.is_empty()).then(|| format!("{ready}/{}", devices.len()))
}

/// Devices that do not serve, each with its reason.
fn troubles(known: &KnownServer) -> String {
    let bad = known.devices.iter().filter(|d| !matches!(d.state, DeviceState::Ready | DeviceState::Unlisted));
    let one = |d: &crate::store::KnownDevice| {
        let why = if d.reason.is_empty() { String::new() } else { format!(": {}", d.reason) };
        format!("{} is {:?}{why}", d.path, d.state)
    };
    bad.map(one).collect::<Vec<_>>().join("; ")
}

fn used(view: &ServerView) -> Option<String> {
    let percent = view.used_bytes.saturating_mul(100).checked_div(view.capacity_bytes)?;
    Some(format!("{}/{} ({percent}%)", size(view.used_bytes), size(view.capacity_bytes)))
}

fn is_low(view: &ServerView) -> bool {
    let percent = view.used_bytes.saturating_mul(100).checked_div(view.capacity_bytes);
    percent.is_some_and(|percent| percent >= SPACE_LOW_PERCENT)
}

fn ready(state: ServerState, message: Option<String>) -> Shown {
    let status = ConditionStatus::from(matches!(state, ServerState::Ready | ServerState::Draining));
    let text = message.unwrap_or_else(|| format!("the leader sees it as {state:?}"));
    Shown::new("Ready", status, &format!("{state:?}"), text)
}

fn devices_ready(view: &ServerView, known: Option<&KnownServer>) -> Shown {
    let kind = "DevicesReady";
    let devices = known.map_or(&[][..], |known| &known.devices);
    let worst = |wanted: DeviceState| devices.iter().any(|d| d.state == wanted);
    let order = [DeviceState::Refused, DeviceState::Failed, DeviceState::Missing, DeviceState::Opening];
    match order.into_iter().find(|state| worst(*state)) {
        Some(state) => {
            let status = if state == DeviceState::Opening { ConditionStatus::Unknown } else { ConditionStatus::False };
            Shown::new(kind, status, &format!("{state:?}"), known.map(troubles).unwrap_or_default())
        }
        // Without Kubernetes the devices are the server's own matter: it has one open or not.
        None if devices.is_empty() && view.capacity_bytes == 0 => {
            let text = "it has no device: name one in spec.devices".to_owned();
            Shown::new(kind, ConditionStatus::False, "NoDevice", text)
        }
        None => Shown::new(kind, ConditionStatus::True, "AllReady", "every device that is named serves".to_owned()),
    }
}

fn drained(view: &ServerView, drain: bool, names: &dyn Names) -> Shown {
    let kind = "Drained";
    let left = view.copies.1;
    if !drain {
        return Shown::new(kind, ConditionStatus::False, "NotAsked", "spec.drain is false".to_owned());
    }
    if left == 0 {
        let text = "no Volume has a copy here any more; the server may go".to_owned();
        return Shown::new(kind, ConditionStatus::True, "NoCopies", text);
    }
    let stuck = view.vetoes.iter().filter(|veto| veto.reason != VetoReason::BeingMoved);
    let stuck: Vec<_> = stuck.map(|veto| format!("{} ({:?})", names.volume(veto.volume), veto.reason)).collect();
    let (reason, why) = if stuck.is_empty() {
        ("Moving", String::new())
    } else {
        ("Vetoed", format!("; these cannot move now: {}", stuck.join(", ")))
    };
    Shown::new(kind, ConditionStatus::False, reason, format!("{left} copies are still here{why}"))
}

fn space_low(view: &ServerView) -> Shown {
    let kind = "SpaceLow";
    match used(view) {
        None => Shown::new(kind, ConditionStatus::Unknown, "NoDevice", "no device is open".to_owned()),
        Some(used) if is_low(view) => {
            let text = format!(
                "{used} are taken; when nothing is left, writes to new places fail: add a device, or move copies away"
            );
            Shown::new(kind, ConditionStatus::True, "AlmostFull", text)
        }
        Some(used) => Shown::new(kind, ConditionStatus::False, "EnoughSpace", format!("{used} are taken")),
    }
}

fn orphan(orphan: &Orphan) -> server_api::Orphan {
    server_api::Orphan {
        copy: Id::of(orphan.copy.0),
        volume: Id::of(orphan.volume.0),
        stored: i64::try_from(orphan.stored.0).unwrap_or(i64::MAX),
        volume_known: orphan.volume_known,
    }
}

fn shown_veto(veto: &lamina_protocol::management::Veto, names: &dyn Names) -> server_api::Veto {
    server_api::Veto {
        copy: Id::of(veto.copy.0),
        volume: names.volume(veto.volume),
        reason: match veto.reason {
            VetoReason::LastActiveCopy => server_api::VetoReason::LastActiveCopy,
            VetoReason::NoRoomElsewhere => server_api::VetoReason::NoRoomElsewhere,
            VetoReason::BeingMoved => server_api::VetoReason::BeingMoved,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::KnownDevice;
    use lamina_protocol::ids::{CopyId, ServerId};
    use lamina_protocol::management::{ServerObject, Veto};

    struct Plain;

    impl Names for Plain {
        fn server(&self, id: ServerId) -> String {
            id.to_string()
        }

        fn volume(&self, id: VolumeId) -> String {
            format!("volume-{}", id.0)
        }
    }

    fn view(used_bytes: u64) -> ServerView {
        ServerView {
            id: ServerId(1),
            health: ServerHealth::Alive,
            leaving: false,
            capacity_bytes: 1000,
            used_bytes,
            provisioned_bytes: 0,
            copies: (2, 2),
            vetoes: Vec::new(),
        }
    }

    fn known(devices: &[(&str, DeviceState, &str)], drain: bool) -> KnownServer {
        let device = |(path, state, reason): &(&str, DeviceState, &str)| KnownDevice {
            path: (*path).to_owned(),
            state: *state,
            reason: (*reason).to_owned(),
        };
        KnownServer {
            name: "n".to_owned(),
            control: Vec::new(),
            devices: devices.iter().map(device).collect(),
            object: ServerObject { drain, ..ServerObject::default() },
        }
    }

    fn shown<'a>(of: &'a ServerDescription, kind: &str) -> (ConditionStatus, &'a str, &'a str) {
        let found = of.conditions.iter().find(|c| c.kind == kind);
        found.map_or((ConditionStatus::Unknown, "", ""), |c| (c.status, c.reason.as_str(), c.text.as_str()))
    }

    #[test]
    fn a_refused_device_is_named_with_what_was_found_on_it() {
        let known = known(&[("/dev/a", DeviceState::Ready, ""), ("/dev/b", DeviceState::Refused, "found xfs")], false);
        let of = of_server(&view(10), &[], &[], Some(&known), &Plain);
        assert_eq!(of.summary.devices.as_deref(), Some("1/2"));
        let text = "/dev/b is Refused: found xfs";
        assert_eq!(shown(&of, "DevicesReady"), (ConditionStatus::False, "Refused", text));
        assert_eq!(of.summary.message.as_deref(), Some(text));
    }

    #[test]
    fn space_and_drain_say_in_plain_words_how_far_they_are() {
        let of = of_server(&view(890), &[], &[], Some(&known(&[], false)), &Plain);
        assert_eq!(of.summary.used.as_deref(), Some("890/1000 (89%)"));
        assert_eq!(shown(&of, "SpaceLow").0, ConditionStatus::False);
        assert_eq!(shown(&of, "Drained").1, "NotAsked");
        let veto = Veto { volume: VolumeId(7), copy: CopyId(1), reason: VetoReason::NoRoomElsewhere };
        let full = ServerView { vetoes: vec![veto], ..view(900) };
        let of = of_server(&full, &[], &[], Some(&known(&[], true)), &Plain);
        assert_eq!((of.state, shown(&of, "SpaceLow").0), (ServerState::Draining, ConditionStatus::True));
        let text = "2 copies are still here; these cannot move now: volume-7 (NoRoomElsewhere)";
        assert_eq!(shown(&of, "Drained"), (ConditionStatus::False, "Vetoed", text));
        let empty = ServerView { copies: (0, 0), ..view(1) };
        let of = of_server(&empty, &[], &[], Some(&known(&[], true)), &Plain);
        assert_eq!((of.state, shown(&of, "Drained").0), (ServerState::Drained, ConditionStatus::True));
        assert!(of.conditions.iter().all(|c| !c.reason.is_empty() && !c.text.is_empty()));
    }
}
