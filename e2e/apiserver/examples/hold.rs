//! Starts an API server, prints the kubeconfig's path, and ends it when the input ends: for trying things by hand.
//!
//! `sleep 600 | cargo run -p lamina-test-apiserver --example hold`

use std::io::Read;

#[tokio::main]
async fn main() -> Result<(), lamina_test_apiserver::StartError> {
    let server = lamina_test_apiserver::TestApiServer::start().await?;
    println!("export KUBECONFIG={}", server.kubeconfig().display());
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}
