//! Events on their way to containerd: in order, each once, kept while containerd is away.
//!
//! Contract: [`Publisher::publish`] never waits. One task sends what is queued, one after the other; while containerd
//! does not answer it tries again, at growing intervals and whenever a request shows that containerd is back. At most
//! [`QUEUE`] events wait; what does not fit is lost and logged.
//! (The publisher of the crate `containerd-shim` sends a failed event again behind later ones, and gives up early.)

use std::{sync::Arc, time::Duration};

use containerd_shim_protos::{
    api::ForwardRequest,
    protobuf::{MessageFull, SpecialFields, well_known_types::any::Any},
    shim::event::Envelope,
    shim_async::{Client, EventsClient},
    ttrpc::{self, context},
};
use tokio::{
    sync::{Notify, mpsc},
    task::JoinHandle,
    time::timeout,
};

use super::logger::Logger;

/// How many events wait for a containerd that is away.
const QUEUE: usize = 2048;

/// How long containerd may take for one event.
const ANSWER: Duration = Duration::from_secs(10);

/// Between attempts: at first, and at most.
const PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(30));

/// How long the last events may take when the server ends.
const LAST_EVENTS: Duration = Duration::from_secs(3);

/// Where events are handed in.
#[derive(Debug)]
pub(super) struct Publisher {
    namespace: String,
    queue: mpsc::Sender<Envelope>,
    awake: Arc<Notify>,
    log: Logger,
}

/// The task that sends them.
#[derive(Debug)]
pub(super) struct Sending {
    task: JoinHandle<()>,
    over: Arc<Notify>,
}

/// Starts sending to the socket `address` (`unix:///path` or a path). Must be called inside a runtime.
pub(super) fn publisher(address: &str, namespace: &str, log: Logger) -> (Publisher, Sending) {
    let (queue, waiting) = mpsc::channel(QUEUE);
    let awake = Arc::new(Notify::new());
    let address = match address.contains("://") {
        true => address.to_owned(),
        false => format!("unix://{address}"),
    };
    let over = Arc::new(Notify::new());
    let ends = (Arc::clone(&awake), Arc::clone(&over));
    let task = tokio::spawn(send_all(address, waiting, ends, log.clone()));
    let publisher = Publisher {
        namespace: namespace.to_owned(),
        queue,
        awake,
        log,
    };
    (publisher, Sending { task, over })
}

impl Publisher {
    /// Queues an event.
    pub(super) fn publish<M: MessageFull>(&self, topic: &str, event: &M) {
        // A message of texts and numbers always encodes.
        let value = event.write_to_bytes().unwrap_or_default();
        let envelope = Envelope {
            timestamp: Some(super::process::timestamp(std::time::SystemTime::now())).into(),
            namespace: self.namespace.clone(),
            topic: topic.to_owned(),
            event: Some(Any {
                type_url: M::descriptor().full_name().to_owned(),
                value,
                special_fields: SpecialFields::new(),
            })
            .into(),
            special_fields: SpecialFields::new(),
        };
        if self.queue.try_send(envelope).is_err() {
            self.log.warning(&format!(
                "event {topic} is lost: containerd is away for too long"
            ));
        }
    }

    /// containerd has been heard of: what waits is sent now.
    pub(super) fn containerd_is_back(&self) {
        self.awake.notify_one();
    }
}

impl Sending {
    /// Waits until everything is sent that has been handed in; nothing more is taken, whoever still has the publisher.
    pub(super) async fn finish(self) {
        self.over.notify_one();
        // What containerd does not take now it will not miss: it asks for what it needs when it is back.
        let _ = timeout(LAST_EVENTS, self.task).await;
    }
}

async fn send_all(
    address: String,
    mut waiting: mpsc::Receiver<Envelope>,
    (awake, over): (Arc<Notify>, Arc<Notify>),
    log: Logger,
) {
    let mut client = None;
    loop {
        let envelope = tokio::select! {
            envelope = waiting.recv() => envelope,
            () = over.notified() => {
                waiting.close();
                continue;
            }
        };
        let Some(envelope) = envelope else { return };
        let mut pause = PAUSES.0;
        let topic = envelope.topic.clone();
        let request = ForwardRequest {
            envelope: Some(envelope).into(),
            special_fields: SpecialFields::new(),
        };
        loop {
            match send(&address, &mut client, &request).await {
                Ok(()) => break,
                Err(ttrpc::Error::RpcStatus(status)) => {
                    log.warning(&format!(
                        "containerd refuses event {topic}: {}",
                        status.message()
                    ));
                    break;
                }
                Err(_) => client = None,
            }
            let _ = timeout(pause, awake.notified()).await;
            pause = pause.saturating_mul(2).min(PAUSES.1);
        }
    }
}

async fn send(
    address: &str,
    client: &mut Option<EventsClient>,
    request: &ForwardRequest,
) -> ttrpc::Result<()> {
    let events = match client {
        Some(events) => events,
        None => client.insert(EventsClient::new(Client::connect(address).await?)),
    };
    match timeout(ANSWER, events.forward(context::with_timeout(0), request)).await {
        Ok(answer) => answer.map(drop),
        Err(_) => Err(ttrpc::Error::LocalClosed),
    }
}

#[cfg(test)]
mod tests {
    use containerd_shim_protos::{
        api::Empty,
        events::task::{TaskExit, TaskStart},
        shim_async::{Events, create_events},
        ttrpc::r#async::{Server, TtrpcContext},
    };

    use super::*;

    struct Containerd(mpsc::UnboundedSender<String>);

    #[async_trait::async_trait]
    impl Events for Containerd {
        async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
            let envelope = request.envelope.unwrap_or_default();
            let kind = envelope.event.type_url.clone();
            self.0
                .send(format!("{} {} {kind}", envelope.namespace, envelope.topic))
                .unwrap();
            Ok(Empty::default())
        }
    }

    #[tokio::test]
    async fn events_wait_for_a_containerd_that_is_away_and_keep_their_order() {
        let dir = tempfile::tempdir().unwrap();
        let address = format!("unix://{}/e", dir.path().display());
        let (publisher, sending) = publisher(&address, "ns", Logger::silent());
        publisher.publish("/tasks/start", &TaskStart::default());
        publisher.publish("/tasks/exit", &TaskExit::default());
        tokio::task::yield_now().await;
        let (tell, mut told) = mpsc::unbounded_channel();
        let mut server = Server::new()
            .bind(&address)
            .unwrap()
            .register_service(create_events(Arc::new(Containerd(tell))));
        server.start().await.unwrap();
        publisher.containerd_is_back();
        assert_eq!(
            told.recv().await.unwrap(),
            "ns /tasks/start containerd.events.TaskStart"
        );
        assert_eq!(
            told.recv().await.unwrap(),
            "ns /tasks/exit containerd.events.TaskExit"
        );
        drop(publisher);
        sending.finish().await;
    }

    #[tokio::test]
    async fn the_end_does_not_wait_for_whoever_still_has_the_publisher() {
        let (publisher, sending) = publisher("/nowhere", "ns", Logger::silent());
        let ended = timeout(LAST_EVENTS / 2, sending.finish()).await;
        assert!(ended.is_ok());
        // Nobody takes it any more.
        publisher.publish("/tasks/exit", &TaskExit::default());
    }
}
