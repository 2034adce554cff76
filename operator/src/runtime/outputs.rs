//! Carries out what the leader says.

use std::sync::Arc;
use std::time::Duration;

use lamina_protocol::control::ControlRequest;
use lamina_protocol::ids::{ServerId, VolumeId};
use lamina_protocol::management::{CallId, Event, EventReason, Guard, Input, Output, Status, Step};

use super::{Died, Done, Runtime};
use crate::metrics::Named;
use crate::store::{KnownServer, Notice};
use lamina_crds::storage_server::DeviceState;

/// Between two tries to read an object that the store does not give.
const READ_AGAIN: Duration = Duration::from_millis(500);

impl Runtime {
    pub(super) fn carry_out(&mut self, output: Output) -> Result<(), Died> {
        match output {
            Output::Control { server, call, request } => self.control(server, call, request),
            Output::Write { volume, call, kind, guard, next } => {
                tracing::debug!(%volume, ?kind, generation = %next.generation, "writes");
                self.write(volume, call, guard, next);
            }
            Output::Release { volume, call, guard } => self.release(volume, call, guard),
            Output::Read { volume } => self.read(volume),
            Output::RaiseLeaseNumber { above } => {
                let store = Arc::clone(&self.store);
                self.work.spawn(async move {
                    store.raise_lease_number(above).await;
                    Done::Nothing
                });
            }
            Output::Event(event) => self.event(&event),
            Output::Conditions { volume, conditions } => self.shown.conditions(volume, conditions),
            Output::Progress { volume, copies } => self.shown.progress(volume, copies),
            Output::Server(view) => {
                let name = self.by_id.get(&view.id).cloned();
                self.shown.view(name, view);
            }
            Output::Orphans { server, orphans } => {
                let name = self.by_id.get(&server).cloned();
                self.shown.orphans(name, server, orphans);
            }
            Output::Passed { volume, generation, step } => {
                tracing::debug!(%volume, %generation, ?step, "passed");
                return self.pass(step);
            }
            Output::WakeAt(then) => self.wake = then,
        }
        Ok(())
    }

    fn control(&mut self, server: ServerId, call: CallId, request: ControlRequest) {
        let connection = self.by_id.get(&server).and_then(|name| self.connections.get(name));
        if !connection.is_some_and(|connection| connection.call(call, request)) {
            self.follow.push_back(Input::Unreachable { server, call });
        }
    }

    fn write(&mut self, volume: VolumeId, call: CallId, guard: Guard, next: Status) {
        let store = Arc::clone(&self.store);
        self.work.spawn(async move {
            let outcome = store.write(volume, &guard, &next).await;
            Done::Written { volume, call, outcome, next: Some(Box::new(next)) }
        });
    }

    fn release(&mut self, volume: VolumeId, call: CallId, guard: Guard) {
        let store = Arc::clone(&self.store);
        self.work.spawn(async move {
            let outcome = store.release(volume, &guard).await;
            Done::Written { volume, call, outcome, next: None }
        });
    }

    fn read(&mut self, volume: VolumeId) {
        let store = Arc::clone(&self.store);
        self.work.spawn(async move {
            loop {
                match store.read(volume).await {
                    Ok(object) => return Done::Read { volume, object: object.map(Box::new) },
                    Err(why) => tracing::warn!(%volume, %why, "the object could not be read"),
                }
                // sleep: back-off after a failed read of the API server.
                tokio::time::sleep(READ_AGAIN).await;
            }
        });
    }

    fn event(&self, event: &Event) {
        let volume = event.volume.map(|id| self.volume_name(id));
        let server = event.server.map(|id| self.server_name(id));
        let (reason, text) = (format!("{:?}", event.reason), event.text.clone());
        let warning = is_warning(event.reason);
        tracing::info!(volume, server, reason, text, "event");
        self.notify(Notice { volume, server, reason, text, warning });
    }

    /// Devices that came to serve, or stopped, since the object was seen last. At first sight only what is wrong is told.
    pub(super) fn tell_devices(&self, known: &KnownServer, before: Option<&KnownServer>) {
        for device in &known.devices {
            let was = before.and_then(|b| b.devices.iter().find(|d| d.path == device.path)).map(|d| d.state);
            let (reason, warning) = match device.state {
                state if was == Some(state) => continue,
                DeviceState::Refused => ("DeviceRefused", true),
                DeviceState::Missing => ("DeviceMissing", true),
                DeviceState::Failed => ("DeviceFailed", true),
                DeviceState::Ready if before.is_some() => ("DeviceReady", false),
                DeviceState::Ready | DeviceState::Opening | DeviceState::Unlisted => continue,
            };
            let why = if device.reason.is_empty() { String::new() } else { format!(": {}", device.reason) };
            let text = format!("{} is {:?}{why}", device.path, device.state);
            let (server, reason) = (Some(known.name.clone()), reason.to_owned());
            tracing::info!(server, reason, text, "event");
            self.notify(Notice { volume: None, server, reason, text, warning });
        }
    }

    fn notify(&self, notice: Notice) {
        if self.notices.try_send(notice).is_err() {
            self.options.metrics.events_dropped.inc();
        }
    }

    pub(super) fn volume_name(&self, id: VolumeId) -> String {
        self.leader.volume(id).map_or_else(|| id.to_string(), |object| object.name.clone())
    }

    pub(super) fn server_name(&self, id: ServerId) -> String {
        self.by_id.get(&id).cloned().unwrap_or_else(|| id.to_string())
    }

    fn pass(&mut self, step: Step) -> Result<(), Died> {
        self.options.metrics.steps.get_or_create(&Named { name: format!("{step:?}") }).inc();
        let Some(point) = self.options.die_at.filter(|point| point.step == step) else { return Ok(()) };
        self.passed += 1;
        if self.passed == point.time { Err(Died(step)) } else { Ok(()) }
    }
}

fn is_warning(reason: EventReason) -> bool {
    use EventReason::{
        ChangeGivenUp, Diverged, Forced, ForeignServer, LossRaised, MemberFailed, ServerFailed, SessionEnded,
        StaleSession, SuspectsItself,
    };
    matches!(
        reason,
        ChangeGivenUp
            | Diverged
            | Forced
            | ForeignServer
            | LossRaised
            | MemberFailed
            | ServerFailed
            | SessionEnded
            | StaleSession
            | SuspectsItself
    )
}
