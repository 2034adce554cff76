//! `serve`: wiring of the store, the leader and the listeners.

use std::io::IsTerminal;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Args;
use lamina_control_api::accept::patient;
use lamina_crds::size::Size;
use lamina_operator::directory::files::Files;
use lamina_operator::directory::{Directory, Replacing};
use lamina_operator::front::Front;
use lamina_operator::metrics::Metrics;
use lamina_operator::runtime::{self, Ended, FailPoint, Options};
use lamina_operator::store::StoreError;
use lamina_operator::{admin, csi, kubernetes, mint};
use lamina_protocol::management::FillBudget;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::service::Routes;
use tracing_subscriber::EnvFilter;

/// Between two counts of the Lease's number over a directory.
const COUNT_EVERY: Duration = Duration::from_secs(10);
/// How a process says that it died at its fail point.
const DIED: u8 = 86;

#[derive(Args)]
#[command(after_help = "Examples:
  lamina-operator serve --directory /var/lib/lamina/operator
  lamina-operator serve --kubernetes --csi-endpoint=/csi/csi.sock --listen=0.0.0.0:4710 --metrics=0.0.0.0:4790
Traffic is not yet encrypted or authenticated: listen where only Lamina's programs can reach.")]
pub(crate) struct Arguments {
    /// Keep objects in this folder, without Kubernetes. It is made if it is not there.
    #[arg(long, value_name = "DIR", required_unless_present = "kubernetes", conflicts_with = "kubernetes")]
    directory: Option<PathBuf>,
    /// Keep objects in Kubernetes (in a pod, or as KUBECONFIG says). Several replicas elect one leader.
    #[arg(long)]
    kubernetes: bool,
    /// Where drivers and people ask, host:port. Port 0 = any, printed.
    #[arg(long, default_value = "127.0.0.1:4710")]
    listen: SocketAddr,
    /// Where metrics and health are read over HTTP, host:port.
    #[arg(long)]
    metrics: Option<SocketAddr>,
    /// Socket of the CSI controller service. Only with --kubernetes.
    #[arg(long, requires = "kubernetes", value_name = "PATH")]
    csi_endpoint: Option<PathBuf>,
    /// Name of this replica.
    #[arg(long, env = "POD_NAME", default_value = "lamina-operator")]
    pod_name: String,
    /// Namespace of the Lease and of the ConfigMap lamina-cluster.
    #[arg(long, env = "POD_NAMESPACE", default_value = "lamina-system")]
    pod_namespace: String,
    /// Address under which others reach this replica.
    #[arg(long, env = "POD_IP", default_value = "127.0.0.1")]
    pod_ip: std::net::IpAddr,
    /// Bytes per second that all copies being filled may take together in the whole cluster, 1Mi to 1Ti, such as 1Gi. Left
    /// out = no limit but that of policies, and that client requests go first.
    #[arg(long, value_name = "SIZE", value_parser = bytes_per_second)]
    fill_limit: Option<u64>,
    /// The same for those that one storage server fills, of all volumes together.
    #[arg(long, value_name = "SIZE", value_parser = bytes_per_second)]
    server_fill_limit: Option<u64>,
    /// What is logged, such as info or lamina_operator=debug.
    #[arg(long, env = "LAMINA_LOG", default_value = "info")]
    log: String,
    /// For tests: end this process at once (status 86) when it leaves this step of a change, such as Committed or Fenced:2.
    #[arg(long, env = "LAMINA_DIE_AT", hide = true)]
    die_at: Option<FailPoint>,
}

impl Arguments {
    /// Whether the objects are in Kubernetes.
    pub(crate) fn over_kubernetes(&self) -> bool {
        self.kubernetes
    }
}

struct Wired {
    front: Front,
    metrics: Metrics,
    stop: watch::Receiver<bool>,
    die_at: Option<FailPoint>,
    fill_budget: FillBudget,
}

/// A limit of fills; less would leave volumes without their copies for weeks.
fn bytes_per_second(text: &str) -> Result<u64, String> {
    let bytes = text.parse::<Size>().and_then(|size| size.bytes()).map_err(|why| why.to_string())?;
    if (1 << 20..=1 << 40).contains(&bytes) { Ok(bytes) } else { Err("not between 1Mi and 1Ti".to_owned()) }
}

pub(crate) async fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let filter = EnvFilter::try_new(&arguments.log).with_context(|| format!("--log {}", arguments.log))?;
    let colours = std::io::stderr().is_terminal();
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(colours).with_writer(std::io::stderr).init();
    let (stopping, stop) = watch::channel(false);
    tokio::spawn(async move {
        signalled().await;
        tracing::info!("stops");
        let _ = stopping.send(true);
    });
    let fill_budget = FillBudget {
        server_bytes_per_second: arguments.server_fill_limit.unwrap_or(0),
        cluster_bytes_per_second: arguments.fill_limit.unwrap_or(0),
    };
    let die_at = arguments.die_at;
    let wired = Wired { front: Front::default(), metrics: Metrics::default(), stop, die_at, fill_budget };
    if let Some(address) = arguments.metrics {
        let listener = TcpListener::bind(address).await.with_context(|| format!("--metrics {address}"))?;
        tokio::spawn(axum::serve(listener, wired.metrics.router()).into_future());
    }
    let listener =
        TcpListener::bind(arguments.listen).await.with_context(|| format!("--listen {}", arguments.listen))?;
    let ended = match &arguments.directory {
        Some(path) => over_directory(path, listener, wired).await?,
        None => over_kubernetes(&arguments, listener, wired).await?,
    };
    Ok(match ended {
        Ended::Stopped => ExitCode::SUCCESS,
        Ended::Died(step) => {
            eprintln!("lamina-operator: died at {step:?}, as it was told");
            ExitCode::from(DIED)
        }
    })
}

async fn signalled() {
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())
        .expect("the signal handler can be set at the start of the program");
    tokio::select! {
        _ = terminate.recv() => {}
        _ = tokio::signal::ctrl_c() => {}
    }
}

fn options(wired: &Wired, cluster: lamina_protocol::ids::ClusterId) -> Options {
    Options {
        cluster,
        mint,
        fill_budget: wired.fill_budget,
        die_at: wired.die_at,
        metrics: wired.metrics.clone(),
        front: wired.front.clone(),
        stop: wired.stop.clone(),
    }
}

async fn over_directory(path: &Path, listener: TcpListener, wired: Wired) -> anyhow::Result<Ended> {
    let files = Files::new(path.to_owned());
    let Some(_serving) = files.serve()? else { bail!("another operator serves {}", path.display()) };
    let cluster = files.cluster(mint)?;
    let (directory, changes) = Directory::open(path).await?;
    let address = listener.local_addr()?;
    println!("lamina-operator listens on {address}, cluster {cluster}");
    tracing::info!(%address, %cluster, directory = %path.display(), "serves");
    wired.metrics.leading.set(1);
    wired.front.replace_in(Arc::new(Replacing::new(directory.clone(), mint)));
    let services = Routes::new(lamina_control_api::leader::Service::new(wired.front.clone()))
        .add_service(admin::Verbs::new(directory.clone(), mint).into_server());
    tokio::spawn(serve(listener, services, wired.stop.clone()));
    tokio::spawn(count_lease(directory.clone()));
    Ok(runtime::run(options(&wired, cluster), Arc::new(directory), changes).await)
}

async fn count_lease(directory: Directory) {
    let mut every = tokio::time::interval(COUNT_EVERY);
    every.tick().await;
    loop {
        every.tick().await;
        if let Err(why) = directory.count_lease_up(0).await {
            tracing::error!(%why, "the Lease's number could not be counted up");
        }
    }
}

async fn serve(listener: TcpListener, services: Routes, mut stop: watch::Receiver<bool>) {
    let router = tonic::transport::Server::builder()
        .http2_keepalive_interval(Some(Duration::from_secs(10)))
        .add_routes(services);
    let incoming = patient(TcpListenerStream::new(listener));
    let served = router.serve_with_incoming_shutdown(incoming, async move { runtime::stopped(&mut stop).await });
    if let Err(why) = served.await {
        tracing::error!(%why, "the listener is gone");
    }
}

async fn over_kubernetes(arguments: &Arguments, listener: TcpListener, wired: Wired) -> anyhow::Result<Ended> {
    let client = kube::Client::try_default().await.context("no API server: neither a pod's token nor KUBECONFIG")?;
    let replica = kubernetes::Replica {
        name: arguments.pod_name.clone(),
        namespace: arguments.pod_namespace.clone(),
        address: SocketAddr::new(arguments.pod_ip, listener.local_addr()?.port()).to_string(),
    };
    wired.front.replace_in(csi::sessions(client.clone(), mint));
    let services = Routes::new(lamina_control_api::leader::Service::new(wired.front.clone()));
    tokio::spawn(serve(listener, services, wired.stop.clone()));
    if let Some(path) = &arguments.csi_endpoint {
        tokio::spawn(kubernetes::serve_csi(client.clone(), path.clone(), wired.stop.clone()));
    }
    let cluster = cluster_id(&client, &replica.namespace).await?;
    tracing::info!(replica = replica.name, address = replica.address, %cluster, "stands by");
    Ok(kubernetes::run(client, replica, options(&wired, cluster)).await)
}

/// The cluster id; waits for an API server that does not answer yet.
async fn cluster_id(client: &kube::Client, namespace: &str) -> anyhow::Result<lamina_protocol::ids::ClusterId> {
    loop {
        match kubernetes::cluster_id(client, namespace).await {
            Ok(cluster) => return Ok(cluster),
            Err(StoreError::Api(why)) => tracing::warn!(%why, "waits for the API server"),
            Err(why) => bail!("no cluster id in the ConfigMap lamina-cluster of {namespace}: {why}"),
        }
        // sleep: back-off while the ConfigMap cannot be read or made.
        tokio::time::sleep(Duration::from_secs(2)).await;
    }
}
