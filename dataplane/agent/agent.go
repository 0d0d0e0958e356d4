// SPDX-License-Identifier: Apache-2.0

// Package agent keeps the embedded load balancer of a node in step with a cluster's Services: Kubernetes in, lb out.
//
// Its front half is kube-proxy's own: the same watches, change trackers and choice of endpoints, so that what differs
// from kube-proxy is the dataplane. It is the only package that knows k8s.io/kubernetes.
//
// It carries what processes on the node connect and send to, at their sockets, and what arrives at the node's devices, by conntrack's
// NAT, where what the node itself sends is made to arrive; over IPv4 and IPv6, TCP and UDP, and SCTP by packets alone.
package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	v1 "k8s.io/api/core/v1"
	discovery "k8s.io/api/discovery/v1"
	networking "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/klog/v2"
	proxyconfig "k8s.io/kubernetes/pkg/proxy/config"

	"github.com/plimsoll-bench/plimsoll/dataplane/lb"
)

// Defaults of Config. Those that kube-proxy has too are the same there, but for the sync period: kube-proxy waits 1 s
// between syncs, because each of them is long.
const (
	DefaultMinSyncPeriod      = 10 * time.Millisecond
	DefaultHealthzBindAddress = "0.0.0.0:10256"
	DefaultMetricsBindAddress = "127.0.0.1:10249"
)

// retryPeriod is when changes that failed are tried again if nothing else changes before. kube-proxy's is the same.
const retryPeriod = 30 * time.Second

// Config is what an agent needs to know.
type Config struct {
	// Client reaches the API server. NewClient makes one as kube-proxy would.
	Client kubernetes.Interface
	// NodeName decides which endpoints are local, and whose topology counts.
	NodeName string
	// Cgroup is the cgroup2 folder whose processes see Services. It must not be the root of the hierarchy. Empty leaves sockets alone.
	Cgroup string
	// Devices are patterns of path.Match for the names of devices whose packets are looked at, never loopback. None leaves packets alone,
	// those of the node's own processes, too.
	Devices []string
	// Local says which clients are inside the cluster, where packets are looked at.
	Local Local
	// MasqueradeAll has all backends see an address of the node instead of the client's, where packets are translated.
	MasqueradeAll bool
	// Conntrack are the node's settings of connection tracking, where packets are translated.
	Conntrack Conntrack
	// NetNS is the file of the network namespace where the devices are. Empty is that of the calling process.
	NetNS string
	// MinSyncPeriod is the least time between the end of a sync and the next one. The first change after a rest is
	// synced at once. 0 means DefaultMinSyncPeriod.
	MinSyncPeriod time.Duration
	// HealthzBindAddress and MetricsBindAddress are where HTTP is served, as "address:port". Empty means nowhere.
	HealthzBindAddress, MetricsBindAddress string
	// Profiling has net/http/pprof's profiles served at MetricsBindAddress.
	Profiling bool
	// Snapshot is the file from which Services are served after a reboot, until the API server answers. Empty keeps none.
	Snapshot string
	// LB sizes the maps and says where they are pinned.
	LB lb.Options
}

func (c Config) validate() error {
	switch {
	case c.Client == nil:
		return errors.New("agent: no client")
	case c.NodeName == "":
		return errors.New("agent: no node name")
	case c.Cgroup == "" && len(c.Devices) == 0:
		return errors.New("agent: no cgroup and no devices: nothing to carry")
	case c.MinSyncPeriod < 0:
		return fmt.Errorf("agent: minimum sync period %v is negative", c.MinSyncPeriod)
	}
	for _, pattern := range c.Devices {
		if _, err := path.Match(pattern, ""); err != nil {
			return fmt.Errorf("agent: devices %q: %w", pattern, err)
		}
	}
	if err := c.Conntrack.validate(); err != nil {
		return err
	}
	return c.Local.validate()
}

// Run carries the cluster's Services on this node until ctx ends, which is no error. Connects are translated from the
// first sync on, when all Services and endpoint slices have been seen. Without a pin folder translation ends with Run.
//
// Errors wrap lb.ErrNotSupported where the kernel is at fault, and lb.ErrRootCgroup where Cgroup is the root.
func Run(ctx context.Context, cfg Config) (err error) {
	if err := cfg.validate(); err != nil {
		return err
	}
	if cfg.MinSyncPeriod == 0 {
		cfg.MinSyncPeriod = DefaultMinSyncPeriod
	}
	if cfg.LB.PinDir != "" {
		if err := os.MkdirAll(cfg.LB.PinDir, 0o700); err != nil {
			return fmt.Errorf("agent: pin folder: %w", err)
		}
	}
	held, err := lockNode(cfg)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, held.close()) }()
	if len(cfg.Devices) > 0 {
		cfg.LB.Packets = &lb.PacketOptions{KnowsInsiders: cfg.Local.Mode != NoLocalMode, NetNS: cfg.NetNS}
	}
	balancer, err := lb.Load(cfg.LB)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, balancer.Close()) }()
	if err := keepNAT(balancer); err != nil { // frontends over SCTP want it
		return err
	}
	if cfg.Snapshot != "" {
		restore(balancer, cfg.Snapshot, cfg.NodeName)
	}
	var count *census
	if cfg.Cgroup != "" {
		count = &census{balancer, cfg.Cgroup}
		count.take()
		if err := balancer.Attach(cfg.Cgroup); err != nil {
			return err
		}
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var network *network
	if len(cfg.Devices) > 0 {
		if network, err = startNetwork(ctx, cfg, balancer); err != nil {
			return err
		}
		defer func() { <-network.done }()
		defer cancel()
		if err := cfg.Conntrack.set(ctx, cfg.NetNS); err != nil {
			return err
		}
	}

	api := newAPIServer()
	nodes := nodeFactory(cfg, api)
	ipv6 := &ipv6{netNS: cfg.NetNS}
	ipv6.look()
	status := newStatus(balancer, nodes.Core().V1().Nodes(), cfg.NodeName, network, ipv6, api, held.taken)
	var save *saver
	if cfg.Snapshot != "" {
		save = newSaver(cfg, balancer, status)
	}
	var sweep *sweeper
	if cfg.Cgroup != "" {
		sweep = newSweeper(cfg, balancer)
	}
	var syncers []*syncer
	families := []v1.IPFamily{v1.IPv4Protocol, v1.IPv6Protocol}
	var unsynced atomic.Int32
	unsynced.Store(int32(len(families)))
	for _, family := range families {
		syncers = append(syncers, newSyncer(cfg, family, balancer, network, status, save, sweep, func() {
			if unsynced.Add(-1) > 0 {
				return
			}
			if network != nil {
				network.carries()
			}
			// Reading all that there is left as much garbage as it is, and never again will so much be wanted.
			go debug.FreeOSMemory()
			if err := errors.Join(release(cfg, balancer), balancer.Supersede()); err != nil {
				klog.ErrorS(err, "A former agent's programs go on translating", "pinDir", cfg.LB.PinDir)
			}
		}))
	}

	failed := make(chan error, 1)
	servers, err := status.serve(cfg, &reporter{cfg, balancer, network, status, syncers}, failed)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, servers.close()) }()

	// Subtle: the informers end before the loops, whose runners panic when they are asked to run after their end.
	stop := make(chan struct{})
	var loops, watches sync.WaitGroup
	for _, s := range syncers {
		loops.Go(func() { s.loop(stop) })
	}
	defer loops.Wait()
	defer close(stop)
	defer api.running.Wait()
	defer watches.Wait()
	defer cancel()

	follow(ctx, cfg, api, nodes, syncers, network, &watches)
	watches.Go(func() { ipv6.run(ctx) })
	if save != nil {
		watches.Go(func() { save.run(ctx) })
	}
	if sweep != nil {
		watches.Go(func() { sweep.run(ctx) })
	}
	if count != nil {
		watches.Go(func() { count.run(ctx) })
	}
	klog.InfoS("Agent started", "node", cfg.NodeName, "cgroup", cfg.Cgroup)

	select {
	case <-ctx.Done():
		return nil
	case err := <-failed:
		return err
	}
}

// release lets go of what a former agent attached to and this one does not, which would go on.
//
// Subtle: it comes a good while after this one has attached. A connect that passed the hooks' place before they were there sends its first
// packet later, which only devices translate.
func release(cfg Config, balancer *lb.Balancer) error {
	var errs []error
	if cfg.Cgroup == "" {
		errs = append(errs, balancer.ReleaseHooks())
	}
	if len(cfg.Devices) == 0 {
		errs = append(errs, balancer.ReleaseLoop(cfg.NetNS), balancer.KeepDevices())
	}
	return errors.Join(errs...)
}

// follow has the syncers and the network know of the API server's objects, by goroutines of a group, until ctx ends. The network may be nil.
func follow(ctx context.Context, cfg Config, api *apiServer, nodes informers.SharedInformerFactory, syncers []*syncer, network *network, watches *sync.WaitGroup) {
	services, slices := serviceFactory(cfg, api), sliceFactory(cfg, api)
	factories := []informers.SharedInformerFactory{nodes, services, slices}
	node := nodes.Core().V1().Nodes()
	serviceConfig := proxyconfig.NewServiceConfig(ctx, services.Core().V1().Services(), 0)
	sliceConfig := proxyconfig.NewEndpointSliceConfig(ctx, slices.Discovery().V1().EndpointSlices(), 0)
	topologyConfig := proxyconfig.NewNodeTopologyConfig(ctx, node, 0)
	nodeConfig := proxyconfig.NewNodeConfig(ctx, node, 0)
	for _, s := range syncers {
		serviceConfig.RegisterEventHandler(s)
		sliceConfig.RegisterEventHandler(s)
		topologyConfig.RegisterEventHandler(s)
		nodeConfig.RegisterEventHandler(s)
	}
	if network != nil {
		nodeConfig.RegisterEventHandler(network)
		cidrs := cidrFactory(cfg, api)
		factories = append(factories, cidrs)
		cidrConfig := proxyconfig.NewServiceCIDRConfig(ctx, cidrs.Networking().V1().ServiceCIDRs(), 0)
		cidrConfig.RegisterEventHandler(network)
		watches.Go(func() { cidrConfig.Run(ctx.Done()) })
	}
	for _, factory := range factories {
		factory.Start(ctx.Done())
		watches.Go(func() {
			<-ctx.Done()
			factory.Shutdown()
		})
	}
	watches.Go(func() { serviceConfig.Run(ctx.Done()) })
	watches.Go(func() { sliceConfig.Run(ctx.Done()) })
	watches.Go(func() { nodeConfig.Run(ctx.Done()) })
}

// The watches select what kube-proxy's select. Nothing is listed again periodically: the trackers miss no change.

func serviceFactory(cfg Config, api *apiServer) informers.SharedInformerFactory {
	services := cfg.Client.CoreV1().Services(v1.NamespaceAll)
	return informersOf(api, cfg.Client, &v1.Service{}, "services", services, func(o *metav1.ListOptions) {
		o.LabelSelector = "!" + labelServiceProxyName
		o.FieldSelector = fields.OneTermNotEqualSelector("spec.clusterIP", v1.ClusterIPNone).String()
	})
}

func sliceFactory(cfg Config, api *apiServer) informers.SharedInformerFactory {
	slices := cfg.Client.DiscoveryV1().EndpointSlices(v1.NamespaceAll)
	return informersOf(api, cfg.Client, &discovery.EndpointSlice{}, "endpointslices", slices, func(o *metav1.ListOptions) {
		o.LabelSelector = "!" + v1.IsHeadlessService
	})
}

func nodeFactory(cfg Config, api *apiServer) informers.SharedInformerFactory {
	return informersOf(api, cfg.Client, &v1.Node{}, "nodes", cfg.Client.CoreV1().Nodes(), func(o *metav1.ListOptions) {
		o.FieldSelector = fields.OneTermEqualSelector(metav1.ObjectNameField, cfg.NodeName).String()
	})
}

func cidrFactory(cfg Config, api *apiServer) informers.SharedInformerFactory {
	return informersOf(api, cfg.Client, &networking.ServiceCIDR{}, "servicecidrs", cfg.Client.NetworkingV1().ServiceCIDRs(), nil)
}

// labelServiceProxyName names another proxy that a Service is meant for (KEP-2447).
const labelServiceProxyName = "service.kubernetes.io/service-proxy-name"

// strip drops what is never read from an object before it is kept, which is a good part of the agent's memory, and adds what its readers take
// for granted.
func strip(object any) (any, error) {
	if o, err := meta.Accessor(object); err == nil {
		o.SetManagedFields(nil)
		o.SetOwnerReferences(nil)
		o.SetFinalizers(nil)
		o.SetUID("")
	}
	switch o := object.(type) {
	case *v1.Service:
		o.Labels, o.Annotations, o.Spec.Selector, o.Status.Conditions = nil, nil, nil, nil
		// The API server sees to it, but kube-proxy's tracker panics without.
		if c := o.Spec.SessionAffinityConfig; o.Spec.SessionAffinity == v1.ServiceAffinityClientIP && (c == nil || c.ClientIP == nil || c.ClientIP.TimeoutSeconds == nil) {
			seconds := v1.DefaultClientIPServiceAffinitySeconds
			o.Spec.SessionAffinityConfig = &v1.SessionAffinityConfig{ClientIP: &v1.ClientIPConfig{TimeoutSeconds: &seconds}}
		}
	case *discovery.EndpointSlice:
		o.Labels = only(o.Labels, discovery.LabelServiceName)
		o.Annotations = only(o.Annotations, v1.EndpointsLastChangeTriggerTime)
		for i := range o.Endpoints {
			o.Endpoints[i].TargetRef = nil
		}
	}
	return object, nil
}

// only is the part of a map with one key.
func only(all map[string]string, key string) map[string]string {
	value, has := all[key]
	if !has {
		return nil
	}
	return map[string]string{key: value}
}
