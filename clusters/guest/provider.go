// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"context"
	"errors"

	"k8s.io/apimachinery/pkg/runtime"

	"github.com/plimsoll-bench/plimsoll/clusters"
	"github.com/plimsoll-bench/plimsoll/clusters/lab"
)

// Provider opens the node of a guest, from inside: that of a lab, with an API in memory.
type Provider struct{}

var _ clusters.Provider = Provider{}

func (Provider) Name() string { return "guest" }

func (Provider) Doc() string {
	return "a node with a kernel of its own in QEMU, Debian's 6.12 with every mode, that counts instructions; needs no root"
}

// Supports is nil: the guest's kernel has every mode.
func (Provider) Supports(clusters.ProxySpec) error { return nil }

// Create opens the plan's sites in the guest that this process is init of. Plan.Bin is of no account.
func (Provider) Create(ctx context.Context, plan clusters.Plan) ([]clusters.Cluster, error) {
	if !IsInit() {
		return nil, errors.New("sites of guests are opened inside of them")
	}
	plan.Bin = guestBin
	a, err := startAPI()
	if err != nil {
		return nil, err
	}
	made, err := lab.Provider{StartAPI: func() (lab.API, error) { return a, nil }}.Create(ctx, plan)
	if err != nil {
		return nil, errors.Join(err, a.Close(ctx))
	}
	return []clusters.Cluster{&cluster{made[0], a}}, nil
}

// cluster is that of a guest.
type cluster struct {
	clusters.Cluster
	api *api
}

var _ clusters.Writer = (*cluster)(nil)

func (c *cluster) Write(objects []runtime.Object) error {
	for _, o := range objects {
		if err := c.api.create(o); err != nil {
			return err
		}
	}
	return nil
}
