// SPDX-License-Identifier: Apache-2.0

// Package lab is the embedded provider: one control plane and one node per mode, network namespaces on this host's kernel
// that are connected to nothing else.
package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"

	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/plimsoll-bench/plimsoll/clusters"
	"github.com/plimsoll-bench/plimsoll/clusters/host"
)

// Provider opens labs.
type Provider struct {
	// StartAPI starts another API server than etcd and kube-apiserver, which nil stands for.
	StartAPI func() (API, error)
}

// An API is an API server with what stands behind it, or what does as one.
type API interface {
	// RESTConfig reaches it from this process as an administrator.
	RESTConfig() *rest.Config
	// Etcd reaches its storage; a nil client says that there is no way. Close it.
	Etcd() (*clientv3.Client, error)
	// Kubeconfig writes a file for programs that reach it at an address, as 127.0.0.1:6443.
	Kubeconfig(file, address string) error
	// Forward carries the connections that l accepts to it, until l is closed.
	Forward(l net.Listener)
	// Done is closed when it has ended, and Err then says how.
	Done() <-chan struct{}
	Err() error
	Close(ctx context.Context) error
}

var _ clusters.Provider = Provider{}

func (Provider) Name() string { return "lab" }

func (Provider) Doc() string {
	return "an API server and one node per mode as network namespaces on this kernel; needs root"
}

// Supports is nil: a node's namespace carries whatever this kernel does.
func (Provider) Supports(clusters.ProxySpec) error { return nil }

// lab is one control plane and its nodes.
type lab struct {
	run     *host.Run
	control API
	etcd    *clientv3.Client
	nodes   []*node
}

var _ clusters.Cluster = (*lab)(nil)

// Create starts the control plane, makes the nodes, and returns when each proxy is healthy or its node's Err says why not.
func (p Provider) Create(ctx context.Context, plan clusters.Plan) ([]clusters.Cluster, error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("the lab makes network namespaces and cgroups: run it as root (sudo)")
	}
	progress := plan.Progress
	if progress == nil {
		progress = func(string) {}
	}
	if plan.Program == "" {
		var err error
		if plan.Program, err = os.Executable(); err != nil {
			return nil, err
		}
	}
	if err := os.MkdirAll(plan.Dir, 0o755); err != nil {
		return nil, err
	}
	// Absolute, because processes start from it in other places.
	dir, err := filepath.Abs(plan.Dir)
	if err != nil {
		return nil, err
	}
	r, err := host.New(plan.Name, dir)
	if err != nil {
		return nil, err
	}
	l := &lab{run: r}
	if err := l.create(ctx, p.StartAPI, plan, progress); err != nil {
		return nil, errors.Join(err, l.Close(context.WithoutCancel(ctx)))
	}
	return []clusters.Cluster{l}, nil
}

func (l *lab) create(ctx context.Context, startAPI func() (API, error), plan clusters.Plan, progress func(string)) error {
	if startAPI == nil {
		progress("starting etcd and kube-apiserver")
		startAPI = func() (API, error) { return startControlPlane(ctx, l.run, plan.Bin) }
	}
	control, err := startAPI()
	if err != nil {
		return err
	}
	l.control = control
	if l.etcd, err = l.control.Etcd(); err != nil {
		return err
	}
	kubeconfig := filepath.Join(l.run.Dir, "kubeconfig")
	if err := l.control.Kubeconfig(kubeconfig, apiServerLocal); err != nil {
		return err
	}
	// kube-proxy waits for its Node object, so the objects come first.
	client, err := kubernetes.NewForConfig(l.control.RESTConfig())
	if err != nil {
		return err
	}
	for _, spec := range plan.Sites {
		if _, err := client.CoreV1().Nodes().Create(ctx, nodeObject(spec.Name), metav1.CreateOptions{}); err != nil {
			return fmt.Errorf("create Node %s: %w", spec.Name, err)
		}
		n, err := newNode(l.run, plan.Program, spec)
		if err != nil {
			return err
		}
		l.nodes = append(l.nodes, n)
		if err := n.forward(l.control); err != nil {
			return err
		}
	}
	progress(fmt.Sprintf("starting the proxies of %d nodes", len(l.nodes)))
	// Without an API server no proxy becomes healthy: its end is this lab's, not theirs.
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go func() {
		select {
		case <-l.control.Done():
			cancel(l.control.Err())
		case <-ctx.Done():
		}
	}()
	g, ctx := errgroup.WithContext(ctx)
	for _, n := range l.nodes {
		g.Go(func() error { return n.startProxy(ctx, plan.Bin, kubeconfig) })
	}
	return g.Wait()
}

func nodeObject(name string) *corev1.Node {
	return &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{corev1.LabelHostname: name}},
		Spec:       corev1.NodeSpec{PodCIDR: ipv4.pods.String(), PodCIDRs: podRanges()},
		Status: corev1.NodeStatus{Addresses: append(each(func(f family) corev1.NodeAddress {
			return corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: f.node.String()}
		}), corev1.NodeAddress{Type: corev1.NodeHostName, Address: name})},
	}
}

func (l *lab) Sites() []clusters.Site {
	sites := make([]clusters.Site, len(l.nodes))
	for i, n := range l.nodes {
		sites[i] = n
	}
	return sites
}

func (l *lab) RESTConfig() *rest.Config  { return l.control.RESTConfig() }
func (l *lab) Etcd() *clientv3.Client    { return l.etcd }
func (l *lab) ServiceCIDR() netip.Prefix { return ipv4.services }
func (l *lab) Failed() <-chan struct{}   { return l.control.Done() }
func (l *lab) Err() error                { return l.control.Err() }

// Versions is nil: all that runs is of the plan's folder.
func (l *lab) Versions() map[string]string { return nil }

// Pause does nothing: one control plane serves all nodes, and is quiet by itself.
func (l *lab) Pause(context.Context, bool) error { return nil }

// Quiet does nothing: nodes run what they are measured with and nothing else.
func (l *lab) Quiet(context.Context, bool) error { return nil }

// Close ends every process of the lab at once and removes what it made. The cluster's state is worth nothing without it,
// so nothing is asked to end in good order.
func (l *lab) Close(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 2*host.SettleLimit)
	defer cancel()
	var errs []error
	if l.etcd != nil {
		errs = append(errs, l.etcd.Close())
	}
	for _, n := range l.nodes {
		errs = append(errs, n.close(ctx))
	}
	if l.control != nil {
		errs = append(errs, l.control.Close(ctx))
	}
	errs = append(errs, l.run.Close(ctx))
	return errors.Join(errs...)
}
