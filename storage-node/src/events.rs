//! What devices say to the machine, in order.
//!
//! Invariant: it holds at most one event per operation or growth under way, so the devices' queues bound it. What comes
//! while the machine is at work waits here until that is over.

use crate::store::Sink;
use lamina_protocol::ids::BootId;
use lamina_protocol::storage_server::medium::MediumEvent;
use std::cell::RefCell;
use std::rc::Rc;
use tokio::sync::Notify;

/// Events in order of their coming.
#[derive(Default)]
pub(crate) struct Inbox {
    events: RefCell<Vec<(BootId, MediumEvent)>>,
    /// Something has come.
    pub(crate) came: Notify,
}

impl Inbox {
    /// Everything that came.
    pub(crate) fn take(&self) -> Vec<(BootId, MediumEvent)> {
        std::mem::take(&mut *self.events.borrow_mut())
    }

    /// Where the events of one opening go in.
    pub(crate) fn sink(self: &Rc<Self>, boot: BootId) -> Sink {
        let inbox = self.clone();
        Box::new(move |event| {
            let mut events = inbox.events.borrow_mut();
            events.push((boot, event));
            if events.len() == 1 {
                inbox.came.notify_one();
            }
        })
    }
}
