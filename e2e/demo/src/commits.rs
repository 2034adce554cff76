//! Clients of the database that insert rows one by one and write down, outside the volume, each commit that they were
//! told of.
//!
//! Invariant: a client goes on to its next number only after the acknowledgement of the one before is on disk, or after
//! an error, when it never uses that number again: nobody knows whether such a commit happened, and nobody counts it.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use postgres::{Client, Config, NoTls};

use crate::log::{Acknowledged, LogError, Writer, now_ms};

/// Between two attempts to reach a database that is away.
const AGAIN: Duration = Duration::from_millis(200);
/// Between two commits of a client: the machine is small and shared with the whole cluster.
const PACE: Duration = Duration::from_millis(10);

/// What a client writes beside its number, so that a row that came back torn or old is seen.
#[must_use]
pub fn payload(client: u32, n: u64) -> String {
    let mut state = (u64::from(client) << 40) ^ n;
    let words = (0..16).map(|_| {
        // splitmix64: every bit of the number reaches every word.
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        format!("{:016x}", z ^ (z >> 31))
    });
    words.collect()
}

/// How to reach the database of a pod: at a host, or at `host:port`.
#[must_use]
pub fn database(address: &str) -> Config {
    let (host, port) = match address.split_once(':').and_then(|(host, port)| Some((host, port.parse().ok()?))) {
        Some((host, port)) => (host, port),
        None => (address, 5432),
    };
    let mut config = Config::new();
    config
        .host(host)
        .port(port)
        .user("postgres")
        .dbname("postgres")
        .connect_timeout(Duration::from_secs(2))
        .keepalives_idle(Duration::from_secs(5))
        // A pod that was taken away sends nothing any more: give up on its connection.
        .tcp_user_timeout(Duration::from_secs(60));
    config
}

/// Why clients cannot start or ended.
#[derive(Debug, thiserror::Error)]
pub enum CommitError {
    /// The database refuses the table.
    #[error("the table cannot be made: {0}")]
    Table(#[from] postgres::Error),
    /// The log cannot be opened.
    #[error(transparent)]
    Log(#[from] LogError),
    /// The log could not be written: an acknowledged commit may be unlogged, so the run proves nothing.
    #[error("the log cannot be written: {0}")]
    Append(std::io::Error),
    /// A client of the demo panicked.
    #[error("a client broke down")]
    Broken,
}

/// What the clients and their owner share.
#[derive(Debug)]
struct Shared {
    stop: AtomicBool,
    acknowledged: AtomicU64,
    last_ms: AtomicU64,
    host: Mutex<String>,
}

/// Clients at work.
#[derive(Debug)]
pub struct Clients {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<Result<(), CommitError>>>,
}

impl Clients {
    /// Makes the table anew and starts so many clients that log to one file.
    ///
    /// # Errors
    /// The database refuses, or the log cannot be opened.
    pub fn start(host: &str, log: &Path, count: u32) -> Result<Self, CommitError> {
        let mut client = database(host).connect(NoTls)?;
        client.batch_execute(
            "drop table if exists commits;
             create table commits (client int, n bigint, payload text not null, primary key (client, n))",
        )?;
        let (stop, acknowledged, last_ms) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(now_ms()));
        let shared = Arc::new(Shared { stop, acknowledged, last_ms, host: Mutex::new(host.to_owned()) });
        let mut threads = Vec::new();
        for client in 1..=count {
            let (shared, log) = (shared.clone(), Writer::open(log)?);
            threads.push(std::thread::spawn(move || work(client, &shared, log)));
        }
        Ok(Self { shared, threads })
    }

    /// Sends the clients to another address from their next connection on.
    pub fn move_to(&self, host: &str) {
        host.clone_into(&mut self.shared.host.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// Commits acknowledged and logged so far.
    #[must_use]
    pub fn acknowledged(&self) -> u64 {
        self.shared.acknowledged.load(Ordering::Relaxed)
    }

    /// Time since the last acknowledgement of any client.
    #[must_use]
    pub fn silent_for(&self) -> Duration {
        Duration::from_millis(now_ms().saturating_sub(self.shared.last_ms.load(Ordering::Relaxed)))
    }

    /// Ends the clients and waits for them; what they were told of is logged.
    ///
    /// # Errors
    /// A client could not log, or broke down.
    pub fn stop(self) -> Result<u64, CommitError> {
        self.shared.stop.store(true, Ordering::Relaxed);
        for thread in self.threads {
            thread.join().map_err(|_| CommitError::Broken)??;
        }
        Ok(self.shared.acknowledged.load(Ordering::Relaxed))
    }
}

/// One client from begin to end.
fn work(client: u32, shared: &Shared, mut log: Writer) -> Result<(), CommitError> {
    let mut n = 0;
    while !shared.stop.load(Ordering::Relaxed) {
        let host = shared.host.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Ok(mut connection) = database(&host).connect(NoTls) {
            insert(client, &mut n, &mut connection, shared, &mut log)?;
        }
        std::thread::sleep(AGAIN);
    }
    Ok(())
}

/// Inserts over one connection until it fails or the client is to stop.
fn insert(
    client: u32,
    n: &mut u64,
    connection: &mut Client,
    shared: &Shared,
    log: &mut Writer,
) -> Result<(), CommitError> {
    while !shared.stop.load(Ordering::Relaxed) {
        *n += 1;
        let values: [&(dyn postgres::types::ToSql + Sync); 3] = [&(client as i32), &(*n as i64), &payload(client, *n)];
        if connection.execute("insert into commits values ($1, $2, $3)", &values).is_err() {
            return Ok(());
        }
        let at_ms = now_ms();
        log.append(Acknowledged { client, n: *n, at_ms }).map_err(CommitError::Append)?;
        shared.last_ms.fetch_max(at_ms, Ordering::Relaxed);
        shared.acknowledged.fetch_add(1, Ordering::Relaxed);
        std::thread::sleep(PACE);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn no_two_rows_have_the_same_contents() {
        let all: HashSet<String> = (1..5).flat_map(|client| (1..500).map(move |n| payload(client, n))).collect();
        assert_eq!(all.len(), 4 * 499);
        assert_eq!(payload(3, 9), payload(3, 9));
    }
}
