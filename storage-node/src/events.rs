//! What devices' threads say to the server's thread.
//!
//! Invariant: it holds at most one event per operation or growth under way, so the devices' queues bound it; the server's
//! thread is woken when something comes into an empty inbox, and takes all of it at once.

use lamina_protocol::ids::BootId;
use lamina_protocol::storage_server::medium::MediumEvent;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::Notify;

/// Events in order of their coming.
#[derive(Default)]
pub(crate) struct Inbox {
    events: Mutex<Vec<(BootId, MediumEvent)>>,
    /// Something has come.
    pub(crate) came: Notify,
}

impl Inbox {
    fn events(&self) -> MutexGuard<'_, Vec<(BootId, MediumEvent)>> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Everything that came.
    pub(crate) fn take(&self) -> Vec<(BootId, MediumEvent)> {
        std::mem::take(&mut *self.events())
    }

    /// Where the events of one opening go in.
    pub(crate) fn sink(self: &Arc<Self>, boot: BootId) -> Box<dyn FnMut(MediumEvent) + Send> {
        let inbox = self.clone();
        Box::new(move |event| {
            let was_empty = {
                let mut events = inbox.events();
                events.push((boot, event));
                events.len() == 1
            };
            if was_empty {
                inbox.came.notify_one();
            }
        })
    }
}
