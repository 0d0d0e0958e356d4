// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"net/http/pprof"
	"strconv"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/sets"
	coreinformers "k8s.io/client-go/informers/core/v1"
	corelisters "k8s.io/client-go/listers/core/v1"
	"k8s.io/component-base/metrics"
	"k8s.io/component-base/metrics/legacyregistry"
	"k8s.io/klog/v2"
	"k8s.io/kubernetes/pkg/proxy"
	kubeproxyconfig "k8s.io/kubernetes/pkg/proxy/apis/config"
	"k8s.io/kubernetes/pkg/proxy/healthcheck"
	proxymetrics "k8s.io/kubernetes/pkg/proxy/metrics"

	"github.com/plimsoll-bench/plimsoll/dataplane/lb"
)

// Mode is what the agent answers where kube-proxy names its mode.
const Mode = "ebpf"

// registerPartial adds a metric that kube-proxy registers for its own modes only.
var registerPartial = sync.OnceFunc(func() {
	legacyregistry.MustRegister(proxymetrics.SyncPartialProxyRulesLatency)
})

// A status tells over HTTP how the agent does: health as kube-proxy's :10256, metrics as its :10249.
type status struct {
	health         *healthcheck.ProxyHealthServer
	registry       metrics.KubeRegistry
	syncErrors     *metrics.Counter
	snapshotErrors *metrics.Counter
	contested      *metrics.GaugeVec
	ignored        *metrics.GaugeVec
	network        *network // nil without devices
	ipv6           *ipv6
	api            *apiServer
	taken          string // the network namespace, if another agent may be at work there
}

// newStatus registers kube-proxy's metrics under their own names, and the load balancer's.
func newStatus(balancer *lb.Balancer, nodes coreinformers.NodeInformer, nodeName string, network *network, ipv6 *ipv6, api *apiServer, taken string) *status {
	proxymetrics.RegisterMetrics(kubeproxyconfig.ProxyMode(Mode))
	registerPartial()
	s := &status{
		health:   healthcheck.NewProxyHealthServer("", 2*retryPeriod, node{nodes.Lister(), nodeName, nodes.Informer().HasSynced, balancer}),
		registry: metrics.NewKubeRegistry(),
		network:  network,
		ipv6:     ipv6,
		api:      api,
		taken:    taken,
		syncErrors: metrics.NewCounter(&metrics.CounterOpts{
			Name: "plimsoll_lb_sync_errors_total",
			Help: "Changes of frontends that could not be made, each try counted",
		}),
		snapshotErrors: metrics.NewCounter(&metrics.CounterOpts{
			Name: "plimsoll_lb_snapshot_errors_total",
			Help: "Snapshots for the next reboot that could not be written",
		}),
		contested: metrics.NewGaugeVec(&metrics.GaugeOpts{
			Name: "plimsoll_lb_contested_frontends",
			Help: "Frontends that several Service ports want, of which the first by name has it",
		}, []string{"ip_family"}),
		ignored: metrics.NewGaugeVec(&metrics.GaugeOpts{
			Name: "plimsoll_lb_ignored_addresses",
			Help: "External and load balancers' addresses of Services that cannot be served",
		}, []string{"ip_family"}),
	}
	s.registry.MustRegister(s.syncErrors, s.snapshotErrors, s.contested, s.ignored)
	s.registry.RawMustRegister(prometheus.NewGaugeFunc(
		prometheus.GaugeOpts{Name: "plimsoll_lb_packet_path_faults", Help: "What the packet path lacks now, as devices that cannot be watched"},
		func() float64 { return float64(len(network.faults())) },
	))
	s.registry.RawMustRegister(prometheus.NewGaugeFunc(
		prometheus.GaugeOpts{Name: "plimsoll_lb_other_agents", Help: "1 if another agent may be at work in the network namespace, whose lock was held when this one started"},
		func() float64 { return float64(min(1, len(taken))) },
	))
	s.registry.RawMustRegister(prometheus.NewGaugeFunc(
		prometheus.GaugeOpts{
			Name: "plimsoll_lb_family_off", Help: "1 if the node has none of an IP version, so that nobody reaches its Services there",
			ConstLabels: prometheus.Labels{"ip_family": string(v1.IPv6Protocol)},
		},
		func() float64 {
			if ipv6.isOff() {
				return 1
			}
			return 0
		},
	))
	api.register(s.registry)
	gauge := func(name, help string, labels map[string]string, value func(lb.Counts) int) {
		for family, counts := range map[v1.IPFamily]func() lb.Counts{
			v1.IPv4Protocol: func() lb.Counts { c, _ := balancer.Counts(); return c },
			v1.IPv6Protocol: func() lb.Counts { _, c := balancer.Counts(); return c },
		} {
			labels := maps.Clone(labels)
			labels["ip_family"] = string(family)
			s.registry.RawMustRegister(prometheus.NewGaugeFunc(
				prometheus.GaugeOpts{Name: name, Help: help, ConstLabels: labels},
				func() float64 { return float64(value(counts())) },
			))
		}
	}
	none, services, backends := map[string]string{}, map[string]string{"map": "services"}, map[string]string{"map": "backends"}
	gauge("plimsoll_lb_frontends", "Frontends for clients inside the cluster", none, func(c lb.Counts) int { return c.Frontends })
	gauge("plimsoll_lb_backends", "Backends of all frontends together", none, func(c lb.Counts) int { return c.Backends })
	const entries, capacity = "Entries of a map that are taken", "Entries of a map that can be taken"
	gauge("plimsoll_lb_map_entries", entries, services, func(c lb.Counts) int { return c.Entries })
	gauge("plimsoll_lb_map_entries", entries, backends, func(c lb.Counts) int { return c.Slots })
	gauge("plimsoll_lb_map_capacity", capacity, services, func(c lb.Counts) int { return c.ServicesCapacity })
	gauge("plimsoll_lb_map_capacity", capacity, backends, func(c lb.Counts) int { return c.BackendsCapacity })
	return s
}

// node is what health asks whether this node may have traffic.
type node struct {
	lister   corelisters.NodeLister
	name     string
	synced   func() bool // whether the lister has seen what there is
	balancer *lb.Balancer
}

// Node returns nil for a node that is not there, which is not eligible.
//
// While the API server has not answered, a node that a former agent's pins or a snapshot have Services for is taken for one that is there: else
// all nodes whose agents start while the API server is away would have no traffic.
func (n node) Node() *v1.Node {
	synced := n.synced() // before it is looked for
	node, err := n.lister.Get(n.name)
	if err == nil {
		return node
	}
	if !synced {
		for range n.balancer.Frontends() {
			return &v1.Node{}
		}
	}
	return nil
}

// started says that the loop runs: something is on its way until the first sync is over.
func (s *status) started(family v1.IPFamily) {
	s.health.Updated(family)
	proxymetrics.SyncProxyRulesLastQueuedTimestamp.WithLabelValues(string(family)).SetToCurrentTime()
}

// queued says that a sync was asked for.
func (s *status) queued(family v1.IPFamily) {
	s.health.QueuedUpdate(family)
	proxymetrics.SyncProxyRulesLastQueuedTimestamp.WithLabelValues(string(family)).SetToCurrentTime()
}

// An outcome is what came of a sync.
type outcome struct {
	family    v1.IPFamily
	start     time.Time
	changes   int
	noLocal   map[string]sets.Set[proxy.ServicePortName] // ports without a local endpoint that they want, by policy
	contested int                                        // frontends that several ports want
	triggers  map[types.NamespacedName][]time.Time
	err       error
}

// synced says what came of a sync. One that failed leaves health to go bad when it is late.
func (s *status) synced(o outcome) {
	elapsed, label := time.Since(o.start), string(o.family)
	s.contested.WithLabelValues(label).Set(float64(o.contested))
	proxymetrics.SyncProxyRulesLatency.WithLabelValues(label).Observe(elapsed.Seconds())
	proxymetrics.SyncPartialProxyRulesLatency.WithLabelValues(label).Observe(elapsed.Seconds())
	if o.err != nil {
		failed := 0
		for range frontendErrors(o.err) {
			failed++
		}
		s.syncErrors.Add(float64(failed))
		klog.InfoS("Sync failed in part", "ipFamily", o.family, "changes", o.changes, "failed", failed, "elapsed", elapsed, "retry", retryPeriod)
		return
	}
	for _, times := range o.triggers {
		for _, trigger := range times {
			// Another host's clock wrote it, and this one's may have been set since. Less than no time would have the sum sink.
			proxymetrics.NetworkProgrammingLatency.WithLabelValues(label).Observe(max(0, time.Since(trigger)).Seconds())
		}
	}
	for policy, ports := range o.noLocal {
		proxymetrics.SyncProxyRulesNoLocalEndpointsTotal.WithLabelValues(policy, label).Set(float64(ports.Len()))
	}
	s.health.Updated(o.family)
	proxymetrics.SyncProxyRulesLastTimestamp.WithLabelValues(label).SetToCurrentTime()
	klog.V(2).InfoS("Synced", "ipFamily", o.family, "changes", o.changes, "elapsed", elapsed)
}

// servers are HTTP servers that run.
type servers []*http.Server

// serve listens where cfg says. The first server that ends before it is closed tells failed, which has room for one.
func (s *status) serve(cfg Config, reporter *reporter, failed chan<- error) (_ servers, err error) {
	var running servers
	defer func() {
		if err != nil {
			err = errors.Join(err, running.close())
		}
	}()
	for _, server := range []struct {
		name, address string
		handler       http.Handler
	}{
		{"healthz", cfg.HealthzBindAddress, s.healthHandler()},
		{"metrics", cfg.MetricsBindAddress, s.metricsHandler(reporter)},
	} {
		if server.address == "" {
			continue
		}
		listener, err := net.Listen("tcp", server.address)
		if err != nil {
			return running, fmt.Errorf("serve %s: %w", server.name, err)
		}
		http1 := &http.Server{Handler: server.handler, ReadHeaderTimeout: 10 * time.Second}
		running = append(running, http1)
		go func() {
			if err := http1.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
				select {
				case failed <- fmt.Errorf("serve %s: %w", server.name, err):
				default:
				}
			}
		}()
	}
	return running, nil
}

// close ends the servers, and gives answers under way a second.
func (s servers) close() error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	var errs []error
	for _, server := range s {
		if err := server.Shutdown(ctx); err != nil {
			errs = append(errs, server.Close())
		}
	}
	return errors.Join(errs...)
}

// now is how the agent does. It is bad while syncs are late, or the packet path lacks more than the loop.
func (s *status) now() healthcheck.ProxyHealth {
	health := s.health.Health()
	health.Healthy = health.Healthy && !s.network.harmed()
	return health
}

// healthHandler answers /healthz with 200 while the agent does well and the node may have traffic, /livez without asking for the node.
func (s *status) healthHandler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/healthz", func(w http.ResponseWriter, _ *http.Request) {
		health, eligible := s.now(), s.health.NodeEligible()
		health.NodeEligible = &eligible
		writeHealth(w, health, health.Healthy && eligible, proxymetrics.ProxyHealthzTotal)
	})
	mux.HandleFunc("/livez", func(w http.ResponseWriter, _ *http.Request) {
		health := s.now()
		writeHealth(w, health, health.Healthy, proxymetrics.ProxyLivezTotal)
	})
	return mux
}

func writeHealth(w http.ResponseWriter, health healthcheck.ProxyHealth, healthy bool, answers *metrics.CounterVec) {
	code := http.StatusServiceUnavailable
	if healthy {
		code = http.StatusOK
		// As kube-proxy does for older readers: "recent" while healthy.
		health.LastUpdated = health.CurrentTime
	}
	answers.WithLabelValues(strconv.Itoa(code)).Inc()
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(code)
	if err := json.NewEncoder(w).Encode(health); err != nil {
		klog.V(2).InfoS("Health not written", "err", err)
	}
}

// metricsHandler answers /metrics, /proxyMode, /healthz and /status.
func (s *status) metricsHandler(reporter *reporter) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/metrics", metrics.HandlerFor(
		prometheus.Gatherers{legacyregistry.DefaultGatherer, s.registry}, metrics.HandlerOpts{}))
	mux.HandleFunc("/proxyMode", func(w http.ResponseWriter, _ *http.Request) { writeText(w, Mode) })
	mux.HandleFunc("/healthz", func(w http.ResponseWriter, _ *http.Request) { writeText(w, "ok") })
	mux.HandleFunc("/status", reporter.handler)
	if reporter.cfg.Profiling {
		mux.HandleFunc("/debug/pprof/", pprof.Index)
		mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
		mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	}
	return mux
}

func writeText(w http.ResponseWriter, text string) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	if _, err := w.Write([]byte(text)); err != nil {
		klog.V(2).InfoS("Answer not written", "err", err)
	}
}
