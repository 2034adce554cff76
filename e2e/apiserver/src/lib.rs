//! A real kube-apiserver with its etcd for tests: on loopback, on free ports, in a folder that goes with it.
//!
//! Invariant: what was started is ended and removed when the [`TestApiServer`] is dropped, also while a test panics; the
//! API server first, because it can hang once etcd is gone. Nothing of the machine is used but two programs, which
//! `e2e/cluster/build-tools.sh` builds; a machine without them gets [`StartError::NotBuilt`], which a test reports as
//! skipped by name ([`start_or_skip`]). No controllers, no scheduler, no kubelet: objects are stored, admitted and watched,
//! nothing else happens to them.

mod credentials;
mod process;

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use kube::Client;
use kube::config::{KubeConfigOptions, Kubeconfig};
use tempfile::TempDir;

use credentials::Credentials;
use process::Process;

/// How long the two programs may take to be ready, together. Seen: 3 s alone, 15 s on a busy machine.
const READY_WITHIN: Duration = Duration::from_secs(90);
/// Between two questions whether they are ready.
const ASK_EVERY: Duration = Duration::from_millis(100);
/// Another program can take a port between its choice and its use.
const ATTEMPTS: usize = 3;

/// Why there is no API server.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A program is not there: the test is to be skipped by name.
    #[error("{} is not built: run e2e/cluster/build-tools.sh etcd kubernetes", .0.display())]
    NotBuilt(PathBuf),
    /// A program could not be started, or a file not be written.
    #[error("cannot start the API server: {0}")]
    Io(#[from] std::io::Error),
    /// Certificates could not be made.
    #[error("cannot make certificates: {0}")]
    Certificates(#[from] rcgen::Error),
    /// A program ended, or was not ready in time; the end of its log.
    #[error("{program} is not ready: {log}")]
    NotReady {
        /// Which.
        program: &'static str,
        /// The last lines that it wrote.
        log: String,
    },
    /// The kubeconfig is not accepted by the client: a mistake in this crate.
    #[error("the kubeconfig is not usable: {0}")]
    Kubeconfig(#[from] kube::config::KubeconfigError),
    /// No client could be made of it: a mistake in this crate.
    #[error("no client: {0}")]
    Client(#[from] kube::Error),
}

/// A running API server. Dropping it ends it.
#[derive(Debug)]
pub struct TestApiServer {
    // In this order: fields are dropped as they are declared, the API server before etcd, the folder last.
    apiserver: Option<Process>,
    etcd: Option<Process>,
    ports: Ports,
    credentials: Credentials,
    folder: TempDir,
}

#[derive(Clone, Copy, Debug)]
struct Ports {
    api: u16,
    etcd: u16,
    etcd_peer: u16,
}

/// Starts one, or says `skipped: <test>: <why>` and gives `None` when the programs are not built.
///
/// # Panics
/// If they are built and do not start: that is a failure, not a reason to skip.
pub async fn start_or_skip(test: &str) -> Option<TestApiServer> {
    match TestApiServer::start().await {
        Ok(server) => Some(server),
        Err(why @ StartError::NotBuilt(_)) => {
            // The harness keeps what a passing test prints; a skip must be seen all the same.
            use std::io::Write;
            let _ = writeln!(std::io::stderr(), "skipped: {test}: {why}");
            None
        }
        Err(why) => panic!("{test}: {why}"),
    }
}

impl TestApiServer {
    /// Starts etcd and kube-apiserver and waits until the latter is ready.
    ///
    /// # Errors
    /// [`StartError::NotBuilt`] without the programs, the others when something is wrong with them.
    pub async fn start() -> Result<Self, StartError> {
        let mut attempt = 1;
        loop {
            match Self::start_once().await {
                Err(StartError::NotReady { .. }) if attempt < ATTEMPTS => attempt += 1,
                result => return result,
            }
        }
    }

    async fn start_once() -> Result<Self, StartError> {
        program("etcd")?;
        program("kube-apiserver")?;
        let folder = tempfile::Builder::new().prefix("lamina-apiserver-").tempdir()?;
        let ports = Ports::free()?;
        let credentials = Credentials::write(folder.path(), ports.api)?;
        let mut server = Self { apiserver: None, etcd: None, ports, credentials, folder };
        server.resume().await?;
        Ok(server)
    }

    /// Ends both programs; clients get errors until [`resume`](Self::resume). What is stored stays.
    pub fn stop(&mut self) {
        self.apiserver = None;
        self.etcd = None;
    }

    /// Starts both programs again on the same ports, with what is stored, and waits until the API server is ready.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub async fn resume(&mut self) -> Result<(), StartError> {
        self.stop();
        self.etcd = Some(self.start_etcd()?);
        self.apiserver = Some(self.start_apiserver()?);
        self.wait_until_ready().await
    }

    /// Copies what is stored now, for [`restore`](Self::restore). Both programs are stopped meanwhile.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub async fn save(&mut self) -> Result<SavedState, StartError> {
        self.stop();
        let saved = tempfile::Builder::new().prefix("lamina-etcd-").tempdir()?;
        copy_folder(&self.etcd_folder(), saved.path())?;
        self.resume().await?;
        Ok(SavedState(saved))
    }

    /// Puts an old copy in place of what is stored, as an administrator does with a backup of etcd (R6).
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub async fn restore(&mut self, saved: &SavedState) -> Result<(), StartError> {
        self.stop();
        std::fs::remove_dir_all(self.etcd_folder())?;
        copy_folder(saved.0.path(), &self.etcd_folder())?;
        self.resume().await
    }

    /// The kubeconfig of an administrator (group system:masters, who may also impersonate anybody).
    pub fn kubeconfig(&self) -> &Path {
        &self.credentials.kubeconfig
    }

    /// Where it listens.
    pub fn url(&self) -> String {
        format!("https://127.0.0.1:{}", self.ports.api)
    }

    /// A client of the administrator.
    ///
    /// # Errors
    /// [`StartError::Kubeconfig`] or [`StartError::Client`], both mistakes in this crate.
    pub async fn client(&self) -> Result<Client, StartError> {
        Ok(Client::try_from(self.config().await?)?)
    }

    /// A client that acts as this user in these groups.
    ///
    /// # Errors
    /// As [`client`](Self::client).
    pub async fn client_as(&self, user: &str, groups: &[&str]) -> Result<Client, StartError> {
        let mut config = self.config().await?;
        config.auth_info.impersonate = Some(user.to_owned());
        config.auth_info.impersonate_groups = Some(groups.iter().map(|g| (*g).to_owned()).collect());
        Ok(Client::try_from(config)?)
    }

    /// The last lines that the API server wrote.
    pub fn log(&self) -> String {
        self.apiserver.as_ref().map(Process::last_lines).unwrap_or_default()
    }

    async fn config(&self) -> Result<kube::Config, StartError> {
        let kubeconfig = Kubeconfig::read_from(self.kubeconfig())?;
        Ok(kube::Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?)
    }

    fn etcd_folder(&self) -> PathBuf {
        self.folder.path().join("etcd")
    }

    fn start_etcd(&self) -> Result<Process, StartError> {
        let Ports { etcd, etcd_peer, .. } = self.ports;
        let arguments = [
            format!("--data-dir={}", self.etcd_folder().display()),
            format!("--listen-client-urls=http://127.0.0.1:{etcd}"),
            format!("--advertise-client-urls=http://127.0.0.1:{etcd}"),
            format!("--listen-peer-urls=http://127.0.0.1:{etcd_peer}"),
            format!("--initial-advertise-peer-urls=http://127.0.0.1:{etcd_peer}"),
            format!("--initial-cluster=default=http://127.0.0.1:{etcd_peer}"),
            "--unsafe-no-fsync".to_owned(),
            "--log-level=warn".to_owned(),
        ];
        Ok(Process::start("etcd", &program("etcd")?, &arguments, self.folder.path())?)
    }

    fn start_apiserver(&self) -> Result<Process, StartError> {
        let Credentials { certificate, key, tokens, service_account_key, service_account_public_key, .. } =
            &self.credentials;
        let arguments = [
            format!("--etcd-servers=http://127.0.0.1:{}", self.ports.etcd),
            format!("--secure-port={}", self.ports.api),
            "--bind-address=127.0.0.1".to_owned(),
            "--advertise-address=127.0.0.1".to_owned(),
            "--endpoint-reconciler-type=none".to_owned(),
            "--service-cluster-ip-range=10.96.0.0/16".to_owned(),
            format!("--tls-cert-file={}", certificate.display()),
            format!("--tls-private-key-file={}", key.display()),
            format!("--cert-dir={}", self.folder.path().join("certs").display()),
            format!("--token-auth-file={}", tokens.display()),
            "--authorization-mode=Node,RBAC".to_owned(),
            "--allow-privileged=true".to_owned(),
            "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
            format!("--service-account-key-file={}", service_account_public_key.display()),
            format!("--service-account-signing-key-file={}", service_account_key.display()),
            // Nobody makes the default service account of a namespace here.
            "--disable-admission-plugins=ServiceAccount".to_owned(),
        ];
        Ok(Process::start("kube-apiserver", &program("kube-apiserver")?, &arguments, self.folder.path())?)
    }

    async fn wait_until_ready(&mut self) -> Result<(), StartError> {
        let deadline = Instant::now() + READY_WITHIN;
        let client = self.client().await?;
        loop {
            for process in [&mut self.etcd, &mut self.apiserver].into_iter().flatten() {
                if process.ended()? || Instant::now() > deadline {
                    return Err(StartError::NotReady { program: process.name(), log: process.last_lines() });
                }
            }
            let question = kube::core::Request::new("").get("readyz", &Default::default());
            let question = question.expect("a path and no parameters make a request");
            if client.request_text(question).await.is_ok_and(|text| text == "ok") {
                return Ok(());
            }
            tokio::time::sleep(ASK_EVERY).await;
        }
    }
}

/// A copy of what an API server stored; removed when dropped.
#[derive(Debug)]
pub struct SavedState(TempDir);

impl Ports {
    fn free() -> std::io::Result<Self> {
        // All are held until all are chosen, so they differ.
        let listeners = [(); 3].map(|()| TcpListener::bind(("127.0.0.1", 0)));
        let mut ports = [0; 3];
        for (port, listener) in ports.iter_mut().zip(listeners) {
            *port = listener?.local_addr()?.port();
        }
        Ok(Self { api: ports[0], etcd: ports[1], etcd_peer: ports[2] })
    }
}

/// Where `e2e/cluster/build-tools.sh` leaves its programs.
pub fn tools_folder() -> PathBuf {
    let var = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let cache = var("LAMINA_CACHE")
        .or_else(|| var("XDG_CACHE_HOME").map(|cache| cache.join("lamina")))
        .unwrap_or_else(|| var("HOME").unwrap_or_default().join(".cache/lamina"));
    cache.join("cluster-tools/bin")
}

fn program(name: &str) -> Result<PathBuf, StartError> {
    let path = tools_folder().join(name);
    if path.is_file() { Ok(path) } else { Err(StartError::NotBuilt(path)) }
}

fn copy_folder(from: &Path, to: &Path) -> std::io::Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy_folder(&entry.path(), &target)?;
        } else {
            std::fs::copy(entry.path(), target)?;
        }
    }
    Ok(())
}
