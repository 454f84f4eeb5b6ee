//! A client of the CRI, as the kubelet is one: blocking calls with a deadline.

use std::future::Future;
use std::path::Path;
use std::time::Duration;

use k8s_cri::v1::image_service_client::ImageServiceClient;
use k8s_cri::v1::runtime_service_client::RuntimeServiceClient;
use tokio::runtime::{Builder, Runtime};
use tonic::transport::{Channel, Endpoint};
use tonic::{Response, Status};

/// A connection to containerd. Calls are of the generated clients, which are cheap to clone.
pub(crate) struct Cri {
    threads: Runtime,
    channel: Channel,
    /// How long a call may take.
    limit: Duration,
}

impl Cri {
    /// Connects.
    pub(crate) fn connect(socket: &Path, limit: Duration) -> Self {
        let threads = Builder::new_current_thread().enable_all().build();
        let threads = threads.expect("a tokio runtime");
        let endpoint = Endpoint::from_shared(format!("unix://{}", socket.display()));
        let channel = threads.block_on(endpoint.expect("an address").connect());
        Self {
            channel: channel.expect("containerd's socket"),
            threads,
            limit,
        }
    }

    /// The client of pods and containers.
    pub(crate) fn runtime(&self) -> RuntimeServiceClient<Channel> {
        RuntimeServiceClient::new(self.channel.clone())
    }

    /// The client of images.
    pub(crate) fn images(&self) -> ImageServiceClient<Channel> {
        ImageServiceClient::new(self.channel.clone())
    }

    /// Waits for a call's answer.
    pub(crate) fn answer<T>(
        &self,
        call: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, Status> {
        let answered = self
            .threads
            .block_on(async { tokio::time::timeout(self.limit, call).await });
        answered
            .unwrap_or_else(|_| Err(Status::cancelled("the test's deadline has passed")))
            .map(Response::into_inner)
    }
}
