// SPDX-License-Identifier: Apache-2.0

package kind

import (
	"context"
	"fmt"
	"net/netip"
	"path/filepath"
	"strconv"

	corev1 "k8s.io/api/core/v1"

	"github.com/plimsoll-bench/plimsoll/clusters"
	"github.com/plimsoll-bench/plimsoll/clusters/host"
)

// WaitCommand is the hidden subcommand that this program runs as in pods until something is started in them.
const WaitCommand = "pod-wait"

// pod is a real pod on the worker.
type pod struct {
	site    *site
	name    string
	address netip.Addr
	// pid is its container's first process, by which its namespaces are entered.
	pid    int
	cgroup *host.Cgroup
}

var _ clusters.Pod = (*pod)(nil)

// enter takes hold of a pod that runs.
func (p *pod) enter(object *corev1.Pod) error {
	var err error
	if p.address, err = netip.ParseAddr(object.Status.PodIP); err != nil {
		return fmt.Errorf("pod %s: its address: %w", p.name, err)
	}
	p.pid, p.cgroup, err = container(object)
	return err
}

func (p *pod) Name() string        { return p.name }
func (p *pod) Address() netip.Addr { return p.address }
func (p *pod) Cgroup() string      { return p.cgroup.Dir }

// Start runs the image's program inside the container: in all its namespaces and in its cgroup, as `kubectl exec` would, but
// without the API server and the kubelet between here and there.
func (p *pod) Start(_ context.Context, args ...string) (clusters.Process, error) {
	enter := []string{"nsenter", "--target", strconv.Itoa(p.pid), "--mount", "--uts", "--ipc", "--net", "--pid", "--", "/plimsoll"}
	return p.site.cluster.world.run.Start(host.Command{
		Name:   p.site.spec.Name + "/" + p.name,
		Argv:   append(enter, args...),
		Cgroup: p.cgroup,
		Log:    filepath.Join(p.site.dir, p.name+".log"),
		Pipes:  true,
	})
}
