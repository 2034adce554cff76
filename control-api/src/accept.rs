//! Connections for a gRPC server that is to serve as long as its process lives.
//!
//! Invariant: what is handed on never fails. A server ends with the first connection that it cannot accept for want of
//! descriptors or memory, and nobody would notice but those who are not served any more.

use futures::{Stream, StreamExt};
use std::io;
use std::time::Duration;

/// After the process ran out of descriptors or memory.
const PAUSE: Duration = Duration::from_millis(100);

/// What a listener accepts; it pauses where accepting fails.
pub fn patient<C>(incoming: impl Stream<Item = io::Result<C>>) -> impl Stream<Item = io::Result<C>> {
    incoming.filter_map(async |accepted| {
        if let Err(error) = &accepted {
            tracing::warn!("cannot accept a connection: {error}");
            // sleep: no event tells when accepting is worth trying again.
            tokio::time::sleep(PAUSE).await;
        }
        accepted.ok().map(Ok)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::stream;

    #[tokio::test]
    async fn a_connection_that_cannot_be_accepted_ends_nothing() {
        let out_of_descriptors = || Err(io::Error::from_raw_os_error(24));
        let incoming = stream::iter([Ok(1), out_of_descriptors(), out_of_descriptors(), Ok(2)]);
        let accepted: Vec<_> = patient(incoming).map(|accepted| accepted.ok()).collect().await;
        assert_eq!(accepted, [Some(1), Some(2)]);
    }
}
